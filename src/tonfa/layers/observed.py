"""A 16-bit linear that shows its inputs: what a calibration collects its statistics from."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tonfa.errors import FormatError
from tonfa.layers.dense import DenseLinear
from tonfa.layers.fused import FusedLinear, QuantizedInput
from tonfa.ops.activation import QuantizedActivation
from tonfa.ops.fused import Rotary


class ObservedLinear(DenseLinear):
    """A dense linear that calls `see` with each input (M, K) before it multiplies; its outputs are unchanged."""

    def __init__(self, in_features: int, out_features: int, see: Callable[[Tensor], None]) -> None:
        super().__init__(in_features, out_features)
        self._see = see

    def _show(self, x: QuantizedInput) -> None:
        if not isinstance(x, QuantizedActivation):
            raise FormatError("ObservedLinear: expected one input; make it with `quantize`")
        self._see(x.codes)

    def product(self, x: QuantizedInput) -> Tensor:
        """(M, N)."""
        self._show(x)
        return super().product(x)

    def product_gelu_quantize(self, x: QuantizedInput, following: FusedLinear) -> QuantizedInput:
        """The input of `following`: gelu(product)."""
        self._show(x)
        return super().product_gelu_quantize(x, following)

    def product_norm_rope(
        self, x: QuantizedInput, norm_q: Tensor, norm_k: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized and rotated q, k, and v; `product_norm_rope_into` of dense weights calls this."""
        self._show(x)
        return super().product_norm_rope(x, norm_q, norm_k, rotary)

    def product_gate_residual(self, x: QuantizedInput, residual: Tensor, gate: Tensor) -> Tensor:
        """Residual (B, L, N) + gate (B, N) * product."""
        self._show(x)
        return super().product_gate_residual(x, residual, gate)
