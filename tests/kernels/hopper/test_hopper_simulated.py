"""The quantizers' device code on the CPU: their instructions as C++ functions (hopper.hpp, and simt.hpp of ../cuda)."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import astuple, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hopper_backend import check_norms, check_quantized, plain
from torch import Tensor

from support import outlier_input
from tonfa.errors import FormatError
from tonfa.kernels.cuda.kernel import Kernel, Struct, _device_code
from tonfa.kernels.hopper import inputs, quantize, quantize_known
from tonfa.ops import fused
from tonfa.ops import quantize as quantize_op
from tonfa.ops.activation import InputWeights, ScaledFP8

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent
BF16, FP16 = torch.bfloat16, torch.float16

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs g++"),
    pytest.mark.usefixtures("_simulated"),
]


@lru_cache(maxsize=64)
def library(kernel: Kernel, folder: Path) -> Any:
    place = folder / re.sub(r"\W+", "_", str(kernel))
    place.mkdir(exist_ok=True)
    for name, text in _device_code("tonfa.kernels.hopper").items():
        text = re.sub(r"extern __shared__ .*? memory\[\];", "alignas(128) static uint8_t memory[232448];", text)
        (place / name).write_text(re.sub(r"#pragma unroll( \d+)?", "", text))
    for name in ("asynchronous.cuh", "numbers.cuh", "instructions.cuh"):
        (place / name).write_text("")
    (struct,) = kernel.parameters
    call = f"{kernel.name}(*static_cast<{struct.__name__}*>(parameter))"
    (place / "main.cpp").write_text(
        f'#include "simt.hpp"\n#include "hopper.hpp"\n#include "{kernel.name}.cu"\n{struct.layout()}'
        'extern "C" int run(unsigned x, unsigned y, unsigned threads, void* parameter) {\n'
        f"  return run_blocks({{x, y, 1}}, threads, [&] {{ {call}; }});\n}}\n"
    )
    assert COMPILER is not None
    options = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off"]
    defines = [f"-D{name}={value}" for name, value in kernel.defines]
    folders = [f"-I{HERE}", f"-I{HERE.parent / 'cuda'}"]
    command = [COMPILER, *options, *defines, *folders, "-o", str(place / "run.so"), str(place / "main.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:5000]
    return ctypes.CDLL(str(place / "run.so")).run


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulated")


@pytest.fixture
def _simulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def launch(kernel: Kernel, device: torch.device, grid: tuple[int, ...], parameter: Struct) -> None:
        x, y = (*grid, 1)[:2]
        status = library(kernel, folder)(x, y, kernel.threads, ctypes.byref(parameter))
        assert status == 0, f"{kernel}: {status}"

    for module in (quantize, quantize_known):
        monkeypatch.setattr(module, "launch", launch)
        monkeypatch.setattr(module, "multiprocessors", lambda device: 2)
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def weights(k: int, rank: int, dtype: torch.dtype) -> InputWeights:
    generator = torch.Generator().manual_seed(k + rank)
    smooth = (torch.rand(k, generator=generator) + 0.5).to(dtype)
    return InputWeights(smooth, (torch.randn(k, rank, generator=generator) / k**0.5).to(dtype), False, "fp8")


def rows(m: int, k: int, dtype: torch.dtype) -> Tensor:
    return outlier_input(m, k, torch.Generator().manual_seed(m), dtype)


@pytest.mark.parametrize(
    ("m", "k", "rank", "dtype"),
    [
        (1, 64, 16, BF16),
        (3, 192, 0, BF16),
        (79, 1088, 32, FP16),  # two blocks of 40 and 39 rows
        (35, 1024, 48, BF16),
        (5, 3072, 256, BF16),
        (20, 6208, 80, FP16),
    ],
)
def test_quantize(m: int, k: int, rank: int, dtype: torch.dtype) -> None:
    w, x = weights(k, rank, dtype), rows(m, k, dtype)
    x[m // 2 + 1 :] = 0
    found = quantize.quantize(x, inputs.pack_input(w))
    check_quantized(found, quantize_op.reference(x, w))
    check_norms(found)


@pytest.mark.parametrize(
    ("batch", "length", "k", "rank", "dtype"),
    [
        (1, 2, 64, 16, FP16),
        (30, 1, 64, 0, BF16),
        (3, 23, 192, 32, BF16),
        (1, 79, 320, 16, BF16),
        (2, 34, 3072, 64, BF16),
        (1, 3, 5120, 16, BF16),
    ],
)
def test_norm_modulate_quantize(batch: int, length: int, k: int, rank: int, dtype: torch.dtype) -> None:
    w = weights(k, rank, dtype)
    x = torch.cat([rows(batch * length, k, dtype).view(batch, length, k) + 3] * 2, dim=1)[:, :length]
    shift, scale, _ = torch.randn(batch, 3 * k, generator=torch.Generator().manual_seed(0)).to(dtype).chunk(3, dim=1)
    found = quantize.norm_modulate_quantize(x, scale, shift, inputs.pack_input(w))
    check_quantized(found, quantize_op.reference(fused.norm_modulate(x, scale, shift), w))
    check_norms(found)


@pytest.mark.parametrize(
    ("batch", "length", "k", "rank", "dtype"),
    [
        (1, 1, 64, 16, FP16),
        (2, 39, 192, 32, BF16),
        (1, 7, 3072, 64, BF16),
        (2, 3, 1088, 48, FP16),
        (1, 5, 6208, 16, BF16),
    ],
)
def test_quantize_fp8(batch: int, length: int, k: int, rank: int, dtype: torch.dtype) -> None:
    """Of codes that are a part of the tokens, as a double block's are; among them zeros, subnormals and the largest."""
    w = weights(k, rank, dtype)
    w = replace(
        w, smooth_factor=w.smooth_factor.float() * torch.linspace(1, 1.01, k)
    )  # quotients of few bits make ties
    whole = rows(batch * (length + 3), k, torch.float32).view(batch, -1, k) * 20
    whole[:, 3] = 0
    whole[:, -1, ::7] = 448
    whole[:, -1, 1::7] = 2**-9
    center = torch.linspace(-90, 70, k).to(dtype)
    x = ScaledFP8(whole.clamp(-448, 448).to(torch.float8_e4m3fn), torch.tensor([0.25]), center, dtype)[:, 3:]
    found = quantize.quantize_fp8(x, inputs.pack_input(w))
    check_quantized(found, fused.quantize_fp8(Reference, x, w))
    check_norms(found)


def test_modulation_of_other_dtypes_strides_and_places() -> None:
    """Scale float32 and shift 16-bit, parts of larger tensors; x where no 16-byte words begin."""
    w, packed = weights(192, 16, BF16), inputs.pack_input(weights(192, 16, BF16))
    x = torch.cat([torch.zeros(1, dtype=BF16), rows(10, 192, BF16).flatten()])[1:].view(2, 5, 192)
    both = torch.randn(2, 2 * 192, generator=torch.Generator().manual_seed(0))
    shift, scale = both.bfloat16()[:, :192], both.bfloat16().float()[:, 192:]
    found = quantize.norm_modulate_quantize(x, scale, shift, packed)
    check_quantized(found, quantize_op.reference(fused.norm_modulate(x, scale, shift), w))


def test_wrong_modulations_are_named() -> None:
    w, x = inputs.pack_input(weights(192, 16, BF16)), rows(10, 192, BF16).view(2, 5, 192)
    vector = torch.ones(2, 192, dtype=BF16)
    for change, message in (
        ((x[0], vector, vector), r"expected x of shape \(B, L, K\), got \(5, 192\)"),
        ((x, vector[:1], vector), r"scale: expected .* of shape \(2, 192\)"),
        ((x, vector, vector.to("meta")), "shift: expected .* on cpu"),
    ):
        with pytest.raises(FormatError, match=f"norm_modulate_quantize: {message}"):
            quantize.norm_modulate_quantize(*change, w)


class Reference:
    quantize = staticmethod(quantize_op.reference)


@pytest.mark.parametrize(("m", "k", "rank"), [(70, 1024, 32), (9, 192, 48)])
def test_quantize_known(m: int, k: int, rank: int) -> None:
    w, x = weights(k, rank, BF16), rows(m, k, BF16)
    packed = inputs.pack_input(w)
    absmax, arrived = quantize_known.zeros(m, x.device)
    absmax.copy_((x.float() * packed.inverse).abs().amax(1))
    check_quantized(quantize_known.quantize_known(x, packed, absmax, arrived), quantize_op.reference(x, w))
    assert not arrived.any()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e30])
def test_norms(size: float) -> None:
    w, x = weights(192, 0, BF16), (torch.randn(9, 192, generator=torch.Generator().manual_seed(0)) * size).bfloat16()
    x[3, 1:], x[5] = 0, 0
    found = quantize.quantize(x, inputs.pack_input(w))
    check_quantized(found, quantize_op.reference(x, w))
    check_norms(found, 1.10 if 1e-12 <= size <= 1 else None)


def test_a_row_does_not_depend_on_the_others() -> None:
    w, x = inputs.pack_input(weights(192, 32, BF16)), rows(80, 192, BF16).view(1, 80, 192)
    scale, shift = torch.randn(2, 1, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = quantize.norm_modulate_quantize(x, scale, shift, w)
    part = quantize.norm_modulate_quantize(x[:, 37:40], scale, shift, w)
    assert whole.norms is not None and part.norms is not None and torch.equal(part.norms, whole.norms[37:40])
    for mine, theirs in zip(astuple(plain(part))[:3], astuple(plain(whole))[:3], strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs[37:40].view(torch.uint8))
