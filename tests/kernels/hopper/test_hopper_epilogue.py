"""The device code of the product's epilogues on the CPU: where heads are written, and what."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from support import relative_error
from tonfa.kernels.cuda.kernel import _device_code
from tonfa.kernels.hopper import tiles
from tonfa.kernels.hopper.product_kernel import NORM_ROPE, NORM_ROPE_FP8, Product
from tonfa.kernels.hopper.product_norm_rope import _rotary_table
from tonfa.ops import fused

HERE = Path(__file__).parent
TOKENS, HEADS = 32, 2

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@lru_cache(maxsize=8)
def library(epilogue: int, fp16: bool, folder: Path) -> Any:
    place = folder / f"{epilogue}_{int(fp16)}"
    place.mkdir()
    for name in ("product.cuh", "epilogue.cuh"):
        text = _device_code("tonfa.kernels.hopper")[name].replace("#pragma unroll", "")
        (place / name).write_text(text.replace("#pragma once", ""))
    (place / "main.cpp").write_text(
        f'#include "epilogue.cu"\n{Product.layout()}'
        'extern "C" int run(unsigned blocks, Product* a) {\n'
        "  return run_blocks({blocks, 1, 1}, THREADS, [&] { epilogue(*a); });\n}\n"
    )
    values = {"TOKENS": TOKENS, "STAGES": 4, "THREADS": tiles.threads(TOKENS), "CLUSTER": 1}
    values |= {"EPILOGUE": epilogue, "FP16": int(fp16)}
    defines = [f"-D{name}={value}" for name, value in values.items()]
    folders = [f"-I{place}", f"-I{HERE}", f"-I{HERE.parent / 'cuda'}"]
    options = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off"]
    command = ["g++", *options, *defines, *folders, "-o", str(place / "run.so"), str(place / "main.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:5000]
    return ctypes.CDLL(str(place / "run.so")).run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("epilogue")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("batch", "length", "offset"), [(1, 37, 5), (2, 29, 0), (3, 7, 4)])
@pytest.mark.parametrize("epilogue", [NORM_ROPE, NORM_ROPE_FP8])
def test_heads(epilogue: int, batch: int, length: int, offset: int, dtype: torch.dtype, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(batch * length, 3 * HEADS * 128, generator=generator).to(dtype)
    norm_q, norm_k = (torch.rand(128, generator=generator).to(dtype) + 0.5 for _ in range(2))
    angles = torch.rand(length, 64, generator=generator).repeat_interleave(2, 1) * 6
    rotary = angles.cos().half().float(), angles.sin().half().float()
    factors = torch.tensor([32.0, 16.0, 64.0])
    rounded = epilogue == NORM_ROPE_FP8
    out_dtype = torch.float8_e4m3fn if rounded else dtype
    joint = torch.full((3, batch, offset + length + 3, HEADS, 128), torch.nan).to(out_dtype).transpose(2, 3)
    places = joint[:, :, :, offset : offset + length]
    q, k, v = places.unbind(0)
    table = _rotary_table(rotary)
    parameter = Product(
        w=y.data_ptr(),
        out=q.data_ptr(),
        out_k=k.data_ptr(),
        out_v=v.data_ptr(),
        norm_q=norm_q.data_ptr(),
        norm_k=norm_k.data_ptr(),
        rotary=table.data_ptr(),
        factors=factors.data_ptr() if rounded else None,
        batch_stride=q.stride(0),
        token_stride=q.stride(2),
        head_stride=q.stride(1),
        m=y.shape[0],
        n=y.shape[1],
        length=length,
        heads=HEADS,
        run=1,
    )
    assert library(epilogue, dtype == torch.float16, folder)(3, ctypes.byref(parameter)) == 0
    exact = fused.heads_norm_rope(y.float(), norm_q, norm_k, rotary)
    for place, values, factor in zip(places, exact, factors, strict=True):
        expected = (values * factor if rounded else values).to(out_dtype)
        assert (place.float() == expected.float()).float().mean() > 0.999
        assert relative_error(place.float(), expected.float()) < 2e-3
    assert torch.equal(places[2].float(), ((exact[2] * factors[2]) if rounded else exact[2]).to(out_dtype).float())
    joint[:, :, :, offset : offset + length] = 0
    assert joint.float().isnan().sum() == 3 * batch * HEADS * 128 * (offset + 3)
