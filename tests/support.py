"""What several test files share: random weights and inputs with outliers, and the measure of error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tonfa.formats import GROUP_SIZE, INT4, UINT4
from tonfa.weights import SVDQWeights, W4A16Weights

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
"""For tests that run on every device; those on a GPU are skipped where there is none."""

DATA = Path(__file__).parent / "data"


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected, in float64."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def outlier_input(rows: int, channels: int, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(rows, channels) Gaussian with a few channels thirty times as large, as diffusion transformers have them."""
    x = torch.randn(rows, channels, generator=generator)
    x[:, torch.randperm(channels, generator=generator)[: max(1, channels // 64)]] *= 30
    return x.to(dtype)


def random_weights(
    n: int,
    k: int,
    rank: int = 32,
    *,
    generator: torch.Generator,
    unsigned: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> SVDQWeights:
    """Full-range codes, scales that differ by group, a smoothing factor that differs by channel."""
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    wscales = torch.rand(k // GROUP_SIZE, n, generator=generator) * 0.02 + 0.002
    smooth_factor = torch.rand(k, generator=generator) * 2 + 0.25
    down = torch.randn(k, rank, generator=generator) / k**0.5
    up = torch.randn(n, rank, generator=generator) / rank**0.5
    bias = torch.randn(n, generator=generator)
    floats = (t.to(dtype) for t in (wscales, smooth_factor, down, up, bias))
    return SVDQWeights(INT4.pack(codes), *floats, unsigned=unsigned)


def random_modulation(
    n: int, k: int, *, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16
) -> W4A16Weights:
    """Codes 0..15 with scales and zeros that differ by group."""
    codes = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    wscales = torch.rand(k // GROUP_SIZE, n, generator=generator) * 0.02 + 0.002
    wzeros = -7.5 * wscales
    bias = torch.randn(n, generator=generator)
    return W4A16Weights(UINT4.pack(codes), *(t.to(dtype) for t in (wscales, wzeros, bias)))


def attention_inputs(
    kind: str, batch: int, heads: int, tokens: int, size: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, L, D), the same for the same arguments.

    "outliers": a few channels of k and v many times as large; "common": keys share a vector twenty times their spread;
    "heads": every head a hundred times as large as the one before; "zeros": a head of each is nothing but zeros.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, size, generator=generator) for _ in range(3))
    if kind == "outliers":
        k[..., :2] *= 8
        v[..., :3] *= 50
    elif kind == "common":
        k += 20 * torch.randn(batch, heads, 1, size, generator=generator)
    elif kind == "heads":
        growth = 100.0 ** torch.arange(heads)[:, None, None]
        q, k, v = q * growth, k / growth, v * growth
    elif kind == "zeros":
        for i, x in enumerate((q, k, v)):
            x[:, i % heads] = 0
    elif kind != "gaussian":
        raise ValueError(kind)
    return q.to(dtype), k.to(dtype), v.to(dtype)
