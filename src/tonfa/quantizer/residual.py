"""The 4-bit part: codes in [-8, 7] and one scale for each row and group of 64 channels, of least squared error.

The scale has a sign, so that the channel of largest magnitude takes code -8, whichever its sign: 16 levels instead of
the 15 of absmax / 7, at no cost in the kernels, which multiply by the scale. Its magnitude is searched below
absmax / 8, trading a clipped extreme for finer steps. On Gaussian weights this takes the relative error of rounding
to nearest from 0.1076 (absmax / 7) to 0.0949 (sign alone) and 0.0904 (with the search); a grid three times finer
reaches 0.0899.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tonfa.formats import GROUP_SIZE
from tonfa.quantizer.chunks import row_chunks

SHRINKS = (1.04, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76)
"""Candidates for the scale's magnitude, in units of absmax / 8."""


def _codes(groups: Tensor, scales: Tensor) -> Tensor:
    """(N, K/G, G), (N, K/G) float32 -> float codes in [-8, 7]; a scale of 0 gives code 0."""
    divisor = torch.where(scales == 0, 1.0, scales).unsqueeze(2)
    return (groups / divisor).round_().clamp_(-8, 7)


def _search(groups: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K/G, G) float32 -> scales (N, K/G) float32, representable in `dtype`, of least squared error."""
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    extreme = torch.where(-low > high, low, high)
    best = torch.zeros_like(extreme)
    least = torch.full_like(extreme, torch.inf)
    for shrink in SHRINKS:
        scales = (extreme * (-shrink / 8)).to(dtype).float()
        error = _codes(groups, scales).mul_(scales.unsqueeze(2)).sub_(groups).square_().sum(dim=2)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def search_scales(residual: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) float32 -> scales (N, K/G) float32, numbers of `dtype`, possibly negative, of least squared error."""
    scales = residual.new_empty(residual.shape[0], residual.shape[1] // GROUP_SIZE)
    for chunk in row_chunks(residual):
        scales[chunk] = _search(residual[chunk].unflatten(1, (-1, GROUP_SIZE)), dtype)
    return scales


def absmax_scales(residual: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) float32 -> scales absmax / 7 (N, K/G) float32, rounded to `dtype`: the published quantizer's."""
    largest: Tensor = residual.unflatten(1, (-1, GROUP_SIZE)).abs().amax(dim=2)
    return (largest / 7).to(dtype).float()


def nearest(residual: Tensor, scales: Tensor, lowest: int = -8) -> Tensor:
    """The nearest codes (N, K) int8 in [lowest, 7] for scales (N, K/G) float32."""
    codes = torch.empty_like(residual, dtype=torch.int8)
    for chunk in row_chunks(residual):
        found = _codes(residual[chunk].unflatten(1, (-1, GROUP_SIZE)), scales[chunk])
        codes[chunk] = found.clamp_(lowest, 7).flatten(1).to(torch.int8)
    return codes


def quantize_residual(residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, K) float32 -> codes (N, K) int8 in [-8, 7], scales (N, K/G) of `dtype`, possibly negative.

    Scales are rounded to `dtype` before codes are computed from them.
    """
    scales = search_scales(residual, dtype)
    return nearest(residual, scales), scales.to(dtype)
