"""Linears with the statistics of a diffusion transformer's, drawn from a seed, for measuring a quantizer's error.

| kind | input |
|---|---|
| `adaln` | LayerNorm of correlated channels, log-normal scales, 8 massive channels 8 to 25 times as large, modulated |
| `adaln_hard` | the same with 24 massive channels, 15 to 80 times as large |
| `gelu` | GELU of correlated channels of different spread and offset, 8 of them massive |
| `attn` | correlated channels without massive ones, tokens of very different size |
| `gauss` | independent normal numbers |

Correlated means that the covariance's eigenvalues fall as a power law, in a random basis. A modulation is one of 16
pairs of scale and shift a channel, as for 16 timesteps; tokens fall on all of them. Weights are Student-t (5 degrees of
freedom) with 96 decaying low-rank directions, rows of different size, and columns that are smaller where the input is
larger; those of `gauss` are independent normal numbers. Tokens of different seeds share the layer, not a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Kind = Literal["adaln", "adaln_hard", "gelu", "attn", "gauss"]
KINDS: tuple[Kind, ...] = get_args(Kind)
STRUCTURED: tuple[Kind, ...] = ("adaln", "adaln_hard", "gelu", "attn")
"""The kinds whose geometric mean is quoted."""

TIMESTEPS = 16
DIRECTIONS = 96
MASSIVE = {"adaln": (8, 8.0, 25.0), "adaln_hard": (24, 15.0, 80.0), "gelu": (8, 8.0, 25.0)}
"""Number of massive channels, least and largest factor."""
DECAY = {"adaln": 1.0, "adaln_hard": 1.0, "gelu": 0.9, "attn": 1.0}
"""Exponent of the eigenvalues' power law."""
SPREAD = {"adaln": 0.5, "adaln_hard": 0.5, "gelu": 0.5, "attn": 0.3}
"""Standard deviation of the logarithm of the channels' scales."""
LOW_RANK = {"adaln": 0.8, "adaln_hard": 0.9, "gelu": 0.5, "attn": 0.5}
"""Strength of the low-rank directions: the first has this many times the weight of the bulk."""
COLUMNS = 0.5
"""Columns of a weight shrink with this power of the channels' scales."""


@dataclass(frozen=True)
class Layer:
    """One linear y = x W^T + b and the distribution of its inputs."""

    kind: Kind
    weight: Tensor  # (N, K) float32, of bfloat16 numbers
    bias: Tensor  # (N,) float32, of bfloat16 numbers
    basis: Tensor  # (K, K): correlated = normal @ basis
    scales: Tensor  # (K,) channel scales
    gains: Tensor  # (TIMESTEPS, K) modulation
    shifts: Tensor  # (TIMESTEPS, K)

    @property
    def unsigned(self) -> bool:
        """Behind a GELU."""
        return self.kind == "gelu"

    def tokens(self, count: int, seed: int) -> Tensor:
        """(count, K) bfloat16 inputs."""
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(count, self.weight.shape[1], generator=g)
        if self.kind == "gauss":
            return x.bfloat16()
        x = x @ self.basis
        step = torch.randint(TIMESTEPS, (count,), generator=g)
        if self.kind == "gelu":
            return functional.gelu(
                x * self.scales * self.gains[step] + self.shifts[step], approximate="tanh"
            ).bfloat16()
        if self.kind == "attn":
            sizes = torch.randn(count, 4, generator=g).square().mean(dim=1, keepdim=True).sqrt()
            return (x / sizes * self.scales).bfloat16()
        x = functional.layer_norm(x, x.shape[1:])
        return ((x * self.gains[step] + self.shifts[step]) * self.scales).bfloat16()


def make_layer(kind: Kind, size: int, seed: int) -> Layer:
    """A layer of size x size. The kinds of one seed have nothing in common."""
    g = torch.Generator().manual_seed(1000 * seed + KINDS.index(kind))
    bias = (0.1 * torch.randn(size, generator=g)).bfloat16().float()
    if kind == "gauss":
        weight = (torch.randn(size, size, generator=g) / size**0.5).bfloat16().float()
        empty = torch.zeros(0)
        return Layer(kind, weight, bias, empty, empty, empty, empty)
    orthogonal = torch.linalg.qr(torch.randn(size, size, generator=g)).Q
    eigenvalues = torch.arange(1, size + 1) ** -DECAY[kind]
    basis = (eigenvalues * (size / eigenvalues.sum())).sqrt().unsqueeze(1) * orthogonal
    scales = (SPREAD[kind] * torch.randn(size, generator=g)).exp()
    if kind in MASSIVE:
        count, low, high = MASSIVE[kind]
        scales[torch.randperm(size, generator=g)[:count]] *= low + (high - low) * torch.rand(count, generator=g)
    gains = 1 + 0.3 * torch.randn(TIMESTEPS, size, generator=g)
    shifts = 0.3 * torch.randn(TIMESTEPS, size, generator=g)
    if kind == "gelu":
        shifts += 0.5 * torch.randn(size, generator=g) - 0.7

    chi2 = sum(torch.randn(size, size, generator=g).square() for _ in range(5))
    bulk = torch.randn(size, size, generator=g) / (chi2 / 5).sqrt()
    left, right = torch.randn(size, DIRECTIONS, generator=g), torch.randn(DIRECTIONS, size, generator=g)
    strength = torch.arange(1, DIRECTIONS + 1) ** -0.8
    weight = bulk / (5 / 3) ** 0.5 + LOW_RANK[kind] * (left * strength) @ right
    weight *= (0.3 * torch.randn(size, 1, generator=g)).exp() / scales**COLUMNS
    weight = (weight / weight.norm() * size**0.5).bfloat16().float()
    return Layer(kind, weight, bias, basis, scales, gains, shifts)
