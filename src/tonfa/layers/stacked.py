"""StackedLinear: linears that read one input and smooth it differently, behind the interface of one.

Nothing is fused but the norm with what follows it: each part quantizes the input for itself and multiplies for itself,
on whatever backend it is bound to. FLUX's q, k and v are kept so where a checkpoint smooths them apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from tonfa.errors import FormatError
from tonfa.layers.bound import Binding
from tonfa.layers.fused import FusedLinear, QuantizedInput
from tonfa.layers.linear import SVDQLinear
from tonfa.ops import fused
from tonfa.ops.activation import QuantizedActivation, ScaledFP8
from tonfa.ops.fused import Rotary
from tonfa.weights import StackedWeights


class StackedLinear(FusedLinear):
    """The outputs of its parts, side by side; a quantized input is a tuple with one for each part."""

    def __init__(self, parts: Iterable[SVDQLinear]) -> None:
        super().__init__()
        linears = list(parts)
        widths = {part.in_features for part in linears}
        if len(widths) != 1:
            raise FormatError(f"StackedLinear: its parts read {sorted(widths)} channels, expected one number")
        self.parts = nn.ModuleList(linears)
        self.in_features, self.out_features = widths.pop(), sum(part.out_features for part in linears)

    @property
    def _linears(self) -> list[SVDQLinear]:
        return [part for part in self.parts if isinstance(part, SVDQLinear)]

    def weights(self) -> StackedWeights:
        """The parameters of all parts, without a copy."""
        return StackedWeights(tuple(part.weights() for part in self._linears))

    def _key(self) -> Tensor:
        return self._linears[0]._key()

    def _bind(self) -> Binding:
        return self._linears[0].binding()

    def binding(self) -> Binding:
        """The first part's, for kernels that need no weights, such as the attention's.

        Asked for anew each time, because parts are bound to other kernels without this layer's knowledge.
        """
        self.unbind()
        return super().binding()

    def input_weights(self) -> None:
        """None: no one smoothing factor quantizes the input of all parts."""
        return

    def quantize(self, x: Tensor | ScaledFP8) -> QuantizedInput:
        """(..., K) -> the input of each part."""
        return tuple(cast(QuantizedActivation, part.quantize(x)) for part in self._linears)

    def norm_modulate_quantize(self, x: Tensor, scale: Tensor, shift: Tensor) -> QuantizedInput:
        """LayerNorm of x (B, L, K) and modulation with (B, K) each, once; then the input of each part."""
        return self.quantize(fused.norm_modulate(x, scale, shift))

    def product(self, x: QuantizedInput) -> Tensor:
        """(M, N)."""
        if not isinstance(x, tuple):
            raise FormatError("StackedLinear: expected a quantized input for each part; make it with `quantize`")
        return torch.cat([part.product(q) for part, q in zip(self._linears, x, strict=True)], dim=1)

    def product_gelu_quantize(self, x: QuantizedInput, following: FusedLinear) -> QuantizedInput:
        """The input of `following`: gelu(product), quantized."""
        return following.quantize(fused.gelu(self.product(x)))

    def product_norm_rope(
        self, x: QuantizedInput, norm_q: Tensor, norm_k: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized and rotated q, k, and v, each (B, H, L, D), from three parts."""
        return fused.heads_norm_rope(self.product(x), norm_q, norm_k, rotary)

    def product_norm_rope_into(
        self, x: QuantizedInput, norm_q: Tensor, norm_k: Tensor, rotary: Rotary, heads: Tensor, offset: int
    ) -> None:
        """The same for a part of the tokens, copied to its place."""
        fused.write_heads(self.product_norm_rope(x, norm_q, norm_k, rotary), heads, offset)

    def product_gate_residual(self, x: QuantizedInput, residual: Tensor, gate: Tensor) -> Tensor:
        """Residual (B, L, N) + gate (B, N) * product."""
        return fused.gate_residual(self.product(x).view(residual.shape), residual, gate)
