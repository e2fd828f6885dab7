"""A smoothed weight split into branch, 4-bit part and error, and the alternation that finds one.

    W smooth = up (down smooth)^T + codes scales + error

`down` is kept as it is exported, for the raw input, so that the 4-bit part also takes up what rounding the branch to 16
bits loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.formats import INT4
from tonfa.quantizer.lowrank import Factors, low_rank

Quantizer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""(N, K) float32 -> codes (N, K) int8, scales (N, K/G) of the storage dtype."""


@dataclass(frozen=True)
class Branch:
    """The low-rank part, rounded."""

    down: Tensor  # (K, R) 16-bit, for the raw input
    up: Tensor  # (N, R) 16-bit

    def smoothed(self, smooth: Tensor) -> Tensor:
        """(N, K) float32, for the smoothed input."""
        return self.up.float() @ (self.down.float() * smooth.unsqueeze(1)).T


@dataclass(frozen=True)
class Split:
    """All of a quantized weight."""

    branch: Branch
    codes: Tensor  # (N, K) int8
    scales: Tensor  # (N, K/G) 16-bit

    def quantized(self) -> Tensor:
        """(N, K) float32: the 4-bit part, for the smoothed input."""
        return INT4.dequantize(self.codes, self.scales)


def rounded_branch(factors: Factors, smooth: Tensor, dtype: torch.dtype) -> Branch:
    """The factors of a smoothed weight as a checkpoint holds them; smooth (K,) float32."""
    return Branch((factors.down / smooth.unsqueeze(1)).to(dtype), factors.up.to(dtype))


def alternate(
    weight: Tensor,  # (N, K) float32, smoothed
    smooth: Tensor,  # (K,) float32
    quantizer: Quantizer,
    measure: Callable[[Tensor, Split], float],
    *,
    rank: int,
    iterations: int,
    stop_early: bool,
    seed: int,
    dtype: torch.dtype,
    name: str,
) -> Split:
    """The best split met by L = SVD_R(W - Q), Q = quantizer(W - L), starting from Q = 0.

    `measure` is given the remaining error (N, K) and the split. `stop_early` ends with the first rise, as the published
    configuration does. Raises FormatError, naming the linear, if squares overflow.
    """
    best, least = None, math.inf
    target, subspace = weight, None
    for _ in range(1 + iterations):
        factors = low_rank(target, rank, start=subspace, seed=seed)
        subspace = factors.subspace
        branch = rounded_branch(factors, smooth, dtype)
        residual = weight - branch.smoothed(smooth)
        split = Split(branch, *quantizer(residual))
        quantized = split.quantized()
        error = measure(residual.sub_(quantized), split)
        if error < least:
            best, least = split, error
        elif stop_early:
            break
        target = torch.sub(weight, quantized, out=quantized)
    if best is None:
        raise FormatError(f"{name}.weight: values are too large to be squared in float32; the source is damaged")
    return best
