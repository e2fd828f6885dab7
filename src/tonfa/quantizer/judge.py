"""The error of a linear's output on tokens whose activations are quantized as the engine quantizes them.

A judge compares finished candidates. No solver fits a weight to quantized activations: such a fit lowers a layer's
error by a systematic loss of directions of little variance, which adds up over layers and steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tonfa.formats import GELU_SHIFT
from tonfa.ops import quantize
from tonfa.ops.activation import Activations, InputWeights, activation_format


def quantized_input(
    x: Tensor,  # (T, K) 16-bit or float32, raw
    smooth: Tensor,  # (K,)
    activations: Activations,
    unsigned: bool,
) -> Tensor:
    """(T, K) float32: what the 4-bit weight is multiplied with, less the shift of an unsigned layer."""
    none = smooth.new_zeros(x.shape[1], 0)
    found = quantize.reference(x, InputWeights(smooth, none, unsigned, activations))
    number_format = activation_format(activations, unsigned)
    if number_format is None or found.scales is None:
        return found.codes.float()
    values = number_format.dequantize(found.codes, found.scales.float())
    return values - GELU_SHIFT / smooth.float() if number_format.name == "uint4" else values


def widened(quantized: Tensor, activations: Activations) -> Tensor:
    """(N, K) float32: the 4-bit part as the product of 8-bit activations reads it."""
    if activations in ("int4", "none"):
        return quantized
    number_format = activation_format(activations, unsigned=False)
    if number_format is None:
        return quantized
    return number_format.dequantize(*number_format.quantize(quantized))


class Judge:
    """Tokens and the exact outputs of one linear for them."""

    def __init__(self, tokens: Tensor, weight: Tensor, activations: Activations, unsigned: bool) -> None:
        """Tokens (T, K) 16-bit, weight (N, K) float32."""
        self._tokens, self._activations, self._unsigned = tokens, activations, unsigned
        self._weight = weight
        self._smooth: Tensor | None = None
        self._input = self._exact = tokens

    def _place(self, smooth: Tensor) -> None:
        """Quantize the tokens anew if the smoothing has changed."""
        if self._smooth is None or not torch.equal(smooth, self._smooth):
            self._input = quantized_input(self._tokens, smooth, self._activations, self._unsigned)
            self._exact = self._tokens.float() / smooth.float()
            self._smooth = smooth

    def error(self, smooth: Tensor, quantized: Tensor, rest: Tensor) -> float:
        """Sum of squared output errors of the 4-bit part (N, K) of a smoothed weight; `rest` (N, K) has no noise.

        `rest` is what the branch is to make up for: smoothed weight - branch, which the 4-bit part stands for.
        """
        self._place(smooth)
        output = self._input @ widened(quantized, self._activations).T - self._exact @ rest.T
        return float(output.square_().sum(dtype=torch.float64))
