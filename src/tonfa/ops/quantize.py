"""quantize: smooth and quantize a linear's input, and take its low-rank down-projection from the raw input.

    codes, scales = Q(T(x / smooth_factor))      lowrank = x proj_down  (float32 accumulation)

T rounds to the 16-bit dtype of x, for 4-bit formats only: the published kernel's arithmetic. An unsigned 4-bit input is
T(x + GELU_SHIFT) instead of x; the low-rank branch always reads the unshifted x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.formats import GELU_SHIFT
from tonfa.ops.activation import InputWeights, QuantizedActivation, activation_format


def check_input(x: Tensor, smooth_factor: Tensor) -> None:
    """Raise FormatError unless x is a float tensor (..., K) on the weights' device."""
    k = smooth_factor.shape[0]
    if x.ndim < 1 or x.shape[-1] != k:
        raise FormatError(f"input: expected {k} channels in the last dimension, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise FormatError(f"input: expected a floating-point dtype, got {x.dtype}")
    if x.device != smooth_factor.device:
        raise FormatError(f"input is on {x.device}, the weights are on {smooth_factor.device}; move one of them")


def smooth(x: Tensor, w: InputWeights) -> Tensor:
    """(M, K): what is quantized, the shifted and smoothed input."""
    if w.activations != "int4":
        return x.float() / w.smooth_factor.float()
    if w.unsigned:
        x = (x.float() + GELU_SHIFT).to(x.dtype)
    return (x.float() / w.smooth_factor.float()).to(x.dtype)


def reference(
    x: Tensor,  # (..., K) 16-bit or float32
    w: InputWeights,
    dtype: torch.dtype = torch.float32,  # of the low-rank arithmetic
) -> QuantizedActivation:
    """The specification: codes (M, K), scales, lowrank (M, R), with M the product of the leading dimensions."""
    check_input(x, w.smooth_factor)
    rows = x.reshape(-1, x.shape[-1])
    lowrank = rows.to(dtype) @ w.proj_down.to(dtype)
    smoothed = smooth(rows, w)
    number_format = activation_format(w.activations, w.unsigned)
    codes, scales = (smoothed, None) if number_format is None else number_format.quantize(smoothed)
    return QuantizedActivation(codes, scales, lowrank, x.dtype)
