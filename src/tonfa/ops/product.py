"""product: the 4-bit product with its low-rank up-projection and bias.

    y = dequantize(codes, scales) W^T + lowrank proj_up^T + bias

W is `codes * wscales` for "int4" and "none" activations. For 8-bit activations W is first widened to the same 8-bit
format with one scale for each output channel, so that one integer (or FP8) product does the whole of K.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.formats import FP8, INT8
from tonfa.ops.activation import Activations, QuantizedActivation, activation_format
from tonfa.weights import SVDQWeights


def widen(w: SVDQWeights, activations: Activations, levels: int = 127) -> tuple[Tensor, Tensor]:
    """4-bit weights in the 8-bit format of the activations: codes (N, K), scales (N, 1) float32.

    `levels` bounds the integers of "int8": 63 keeps `torch._int_mm` exact on CPUs without VNNI.
    """
    number_format = FP8 if activations == "fp8" else replace(INT8, largest=levels)
    return number_format.quantize(w.residual())


def weight(w: SVDQWeights, activations: Activations, dtype: torch.dtype) -> Tensor:
    """(N, K): what the codes of the input are multiplied with, as numbers."""
    if activations in ("int4", "none"):
        return w.residual(dtype)
    codes, scales = widen(w, activations)
    return codes.to(dtype) * scales.to(dtype)


def reference(
    x: QuantizedActivation,
    w: SVDQWeights,
    activations: Activations,
    dtype: torch.dtype = torch.float32,  # of all arithmetic
) -> Tensor:
    """The specification: (M, N) of x's 16-bit dtype; float64 arithmetic is returned unrounded."""
    if x.lowrank is None:
        raise FormatError("product: the input has no low-rank part; make it with `quantize`")
    number_format = activation_format(activations, w.unsigned)
    if number_format is None or x.scales is None:
        values = x.codes.to(dtype)
    else:
        values = number_format.dequantize(x.codes, x.scales, dtype)
    y = values @ weight(w, activations, dtype).T
    y += x.lowrank.to(dtype) @ w.proj_up.to(dtype).T
    y += w.bias.to(dtype)
    return y if dtype == torch.float64 else y.to(x.dtype)
