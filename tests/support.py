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


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Make PyTorch say that there is one NVIDIA GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


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


def attention_norms(kind: str, size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights (D,) of the norms that q's and k's tokens of `attention_inputs` have passed: two for each."""
    norms = [torch.linspace(0.5, 1.5, size) * factor for factor in (1.0, -0.7, 0.8, 1.1)]
    if kind == "outliers":
        norms[3][:2] *= 8
    return norms[:2], norms[2:]


def attention_inputs(
    kind: str, batch: int, heads: int, tokens: int, size: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, L, D), the same for the same arguments. q and k are RMS-normed, with the second weights of
    `attention_norms` from half of the tokens on.

    "outliers": a few channels of k and v many times as large; "common": keys share a vector as large as their spread;
    "center": values share one twice as large; "heads": every head of v eight times as large as the one before; "zeros":
    a head of each is nothing but zeros.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, tokens, size, generator=generator) for _ in range(3))
    if kind == "outliers":
        v[..., :3] *= 50
    elif kind == "common":
        k += torch.randn(batch, heads, 1, size, generator=generator)
    elif kind == "center":
        v += 2 * torch.randn(1, heads, 1, size, generator=generator)
    elif kind == "heads":
        v *= 8.0 ** torch.arange(heads)[:, None, None]
    elif kind == "zeros":
        for i, x in enumerate((q, k, v)):
            x[:, i % heads] = 0
    elif kind != "gaussian":
        raise ValueError(kind)
    for x, norms in zip((q, k), attention_norms(kind, size), strict=True):
        x *= torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        x[:, :, : tokens // 2] *= norms[0]
        x[:, :, tokens // 2 :] *= norms[1]
    return q.to(dtype), k.to(dtype), v.to(dtype)
