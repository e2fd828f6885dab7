"""What every quantizer of a linear asks of its input."""

from __future__ import annotations

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.formats import GROUP_SIZE
from tonfa.weights import FLOAT_DTYPES


def check_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raise FormatError, naming the tensor, if it holds NaN or Inf, or would in `dtype`."""
    if not torch.isfinite(tensor.to(dtype)).all():
        kind = str(dtype).removeprefix("torch.")
        raise FormatError(f"{name}: holds NaN, Inf or values beyond {kind}; the source is damaged or of a wider dtype")


def check_linear(name: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Raise FormatError unless weight (N, K) and bias (N,) are finite floats, in `dtype` too, and K fits groups."""
    if dtype not in FLOAT_DTYPES:
        raise FormatError(f"{name}: cannot store scales as {dtype}; choose bfloat16, float16 or float32")
    if weight.ndim != 2 or weight.dtype not in FLOAT_DTYPES or 0 in weight.shape:
        shape = tuple(weight.shape)
        raise FormatError(f"{name}.weight: expected a float matrix (N, K), got {weight.dtype} of shape {shape}")
    n, k = weight.shape
    if k % GROUP_SIZE:
        raise FormatError(f"{name}.weight: K = {k} input channels are no multiple of the group size {GROUP_SIZE}")
    check_finite(f"{name}.weight", weight, dtype)
    if bias is None:
        return
    if tuple(bias.shape) != (n,) or bias.dtype not in FLOAT_DTYPES:
        shape = tuple(bias.shape)
        raise FormatError(f"{name}.bias: expected floats of shape ({n},), got {bias.dtype} of shape {shape}")
    check_finite(f"{name}.bias", bias, dtype)
