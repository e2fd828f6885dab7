"""Modulations: asymmetric 4-bit weights, w = code * scale + zero, for 16-bit activations.

Scale and zero start from the group's range and are then refitted to the codes by least squares. On Gaussian weights
the relative error falls from 0.0897 (range alone) to 0.0848; symmetric codes, which published checkpoints hold in the
same format, have 0.1078.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tonfa.formats import GROUP_SIZE, UINT4
from tonfa.quantizer.checks import check_linear
from tonfa.quantizer.chunks import row_chunks
from tonfa.weights import W4A16Weights

REFITS = 4


def _codes(groups: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """(N, K/G, G), (N, K/G), (N, K/G) float32 -> float codes in [0, 15]; a scale of 0 gives code 0."""
    divisor = torch.where(scales == 0, torch.inf, scales).unsqueeze(2)
    return ((groups - zeros.unsqueeze(2)) / divisor).round_().clamp_(0, 15)


def _error(groups: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Squared error (N, K/G) of each group."""
    return (codes * scales.unsqueeze(2)).add_(zeros.unsqueeze(2)).sub_(groups).square_().sum(dim=2)


def _refit(groups: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros (N, K/G) of least squared error for given codes."""
    center = codes.mean(dim=2)
    spread = codes - center.unsqueeze(2)
    variance = spread.square().sum(dim=2)
    scales = (spread * groups).sum(dim=2) / torch.where(variance == 0, torch.inf, variance)
    return scales, groups.mean(dim=2) - scales * center


def _fit(groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K/G, G) float32 -> codes, scales and zeros of least squared error among the refits, float32."""
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    zeros = low.to(dtype).float()
    scales = ((high - zeros) / 15).to(dtype).float()
    codes = _codes(groups, scales, zeros)
    best, least = (scales, zeros), _error(groups, codes, scales, zeros)
    for _ in range(REFITS):
        scales, zeros = (t.to(dtype).float() for t in _refit(groups, codes))
        codes = _codes(groups, scales, zeros)
        error = _error(groups, codes, scales, zeros)
        best = (torch.where(error < least, scales, best[0]), torch.where(error < least, zeros, best[1]))
        least = torch.minimum(error, least)
    return _codes(groups, *best), *best


def quantize_modulation(
    weight: Tensor,  # (N, K) float
    bias: Tensor | None,  # (N,) float
    plus_one: Iterable[tuple[int, int]] = (),
    *,
    dtype: torch.dtype | None = None,
    name: str = "linear",
) -> W4A16Weights:
    """A dense linear as asymmetric 4-bit weights, on the weight's device.

    1 is added to the bias of the row ranges `plus_one`. `dtype` is that of scales, zeros and bias, by default the
    weight's; scales and zeros are rounded to it before codes are computed. Raises FormatError, naming the linear
    `name`, for K that is no multiple of 64, NaN or Inf.
    """
    dtype = weight.dtype if dtype is None else dtype
    check_linear(name, weight, bias, dtype)
    n, k = weight.shape
    device = weight.device
    qweight = torch.empty(n, k // 2, dtype=torch.uint8, device=device)
    wscales, wzeros = (torch.empty(k // GROUP_SIZE, n, dtype=dtype, device=device) for _ in range(2))
    for chunk in row_chunks(weight):
        codes, scales, zeros = _fit(weight[chunk].float().unflatten(1, (-1, GROUP_SIZE)), dtype)
        qweight[chunk] = UINT4.pack(codes.flatten(1))
        wscales[:, chunk] = scales.T.to(dtype)
        wzeros[:, chunk] = zeros.T.to(dtype)
    shifted = torch.zeros(n, device=device) if bias is None else bias.float().clone()
    for start, stop in plus_one:
        shifted[start:stop] += 1
    return W4A16Weights(qweight, wscales, wzeros, shifted.to(dtype))
