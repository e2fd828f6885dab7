"""The device code of attention_center on the CPU: the scales of q, k and v, v's center and the biases less it."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from test_hopper_product_simulated import quantized
from test_hopper_simulated import COMPILER, library
from torch import Tensor

from support import outlier_input, random_weights, relative_error
from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.hopper import attention_center
from tonfa.kernels.hopper.attention_center import Source
from tonfa.kernels.hopper.packed_product import pack_product
from tonfa.ops import attention_fp8

BF16, FP16 = torch.bfloat16, torch.float16
SAMPLES = 32

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs g++")


@pytest.fixture(autouse=True)
def _simulated(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.getbasetemp() / "attention_center"
    folder.mkdir(exist_ok=True)

    def launch(kernel: Kernel, device: torch.device, grid: tuple[int, ...], parameter: Struct) -> None:
        status = library(kernel, folder)(grid[0], 1, kernel.threads, ctypes.byref(parameter))
        assert status == 0, f"{kernel}: {status}"

    monkeypatch.setattr(attention_center, "launch", launch)


def source(rows: int, k: int, heads: int, rank: int, dtype: torch.dtype, seed: int = 0) -> tuple[Source, Tensor]:
    """What makes heads of so many tokens, and their v."""
    generator = torch.Generator().manual_seed(seed)
    w = random_weights(3 * heads * 128, k, max(rank, 1), generator=generator, dtype=dtype)
    w = replace(w, proj_down=w.proj_down[:, :rank], proj_up=w.proj_up[:, :rank])
    x = outlier_input(rows, k, generator, dtype) + torch.randn(k, generator=generator).to(dtype)
    plain, stored = quantized(x, w)
    assert stored.norms is not None and plain.scales is not None and plain.lowrank is not None
    values = plain.codes.float() * plain.scales @ w.residual().T + plain.lowrank @ w.proj_up.float().T
    norms = [(torch.rand(128, generator=generator) + 0.5).to(dtype) for _ in range(2)]
    norms[0][seed] = -3.0
    return Source(stored, stored.norms, pack_product(w), *norms), (values + w.bias.float())[:, 2 * heads * 128 :]


def samples(rows: int) -> list[int]:
    return [(((i << 32) + (i * 0x9E3779B9 + 0x80000000) % 2**32) * rows // SAMPLES) >> 32 for i in range(SAMPLES)]


def check(sources: list[Source], v: Tensor, sampled: int = 0) -> None:
    x = sources[sampled].x
    found = attention_center.prepare(sources, sampled)
    assert relative_error(found.center.float(), v[samples(x.rows)].mean(0)) < 4e-3 and found.center.dtype == x.dtype
    less = torch.cat([torch.zeros(2 * v.shape[1]), found.center.float()])
    assert len(found.biases) == len(sources)
    for s, bias in zip(sources, found.biases, strict=True):
        assert torch.equal(bias, s.w.bias - less)

    most = [s.norms[: s.x.rows].amax() * s.w.value_bound[0] + s.w.value_bound[1] for s in sources]
    bounds = (
        attention_fp8.norm_bound([s.norm_q for s in sources]),
        attention_fp8.norm_bound([s.norm_k for s in sources]),
        2 * torch.stack(most).amax(),
    )
    exponents = [attention_fp8.largest_exponents(bound) for bound in bounds]
    assert torch.equal(found.factors, torch.ldexp(torch.ones(3), torch.stack(exponents)))
    assert torch.equal(found.descale, 1 / found.factors[2:])
    p = attention_fp8.P_SCALE
    expected = [1 / float(found.factors[0] * found.factors[1]), 1.0, 1.0, 1 / p, p, 1.0, 0.0, 0.0]
    assert found.scalars[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("rows", "k", "heads", "rank", "dtype"),
    [
        (1, 64, 1, 16, BF16),
        (45, 192, 2, 32, FP16),
        (300, 320, 1, 0, BF16),
        (39, 3072, 1, 80, BF16),
    ],
)
def test_one_stream(rows: int, k: int, heads: int, rank: int, dtype: torch.dtype) -> None:
    s, v = source(rows, k, heads, rank, dtype)
    check([s], v)


def test_two_streams_have_one_center() -> None:
    (image, v), (text, other) = source(400, 256, 2, 32, BF16), source(21, 256, 2, 32, BF16, seed=1)
    check([image, text], v)
    louder = replace(text, norms=text.norms * 100)
    check([louder, image], v, 1)
    check([louder, image], other, 0)


def test_of_a_branch_beside_others() -> None:
    """The input's low-rank columns begin with those of another linear."""
    s, v = source(30, 128, 1, 80, BF16)
    w = replace(s.w, up=s.w.up[:, 4:].contiguous(), rank=16)
    alone = replace(s, x=replace(s.x, rank_start=64, rank=16), w=w)
    zeros = replace(s, w=replace(s.w, up=torch.cat([torch.zeros_like(s.w.up[:, :4]), s.w.up[:, 4:]], 1)))
    found, expected = (attention_center.prepare([x], 0).center for x in (alone, zeros))
    assert torch.equal(found, expected) and relative_error(found.float(), v[samples(30)].mean(0)) > 0.1


def test_samples_are_spread_evenly() -> None:
    """Over the rows, and over the columns of pictures."""
    for rows, width in ((4096, 64), (4608, 64), (1024, 32), (9216, 96), (8192, 128)):
        taken = torch.tensor(samples(rows))
        assert taken.diff().min() > 0 and taken.diff().max() < 2 * rows / SAMPLES
        columns = torch.sort(taken % width).values
        assert columns.diff().max() < 0.16 * width and columns[0] < 0.16 * width and columns[-1] > 0.84 * width
