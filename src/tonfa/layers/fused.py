"""The interface that the fused model computes with: a linear whose input is quantized apart from its product.

`SVDQLinear` and `DenseLinear` implement it, so one forward pass runs with 4-bit and with 16-bit weights.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from tonfa.layers.bound import Binding, BoundModule
from tonfa.ops import fused
from tonfa.ops.activation import InputWeights, QuantizedActivation, ScaledFP8
from tonfa.ops.fused import Rotary

QuantizedInput = QuantizedActivation | tuple[QuantizedActivation, ...]
"""A linear's quantized input; one for each part of a linear whose parts smooth differently."""


class FusedLinear(BoundModule):
    """A linear y = x W^T + b in steps: `quantize` its input (or fuse that with what comes before), then a product."""

    in_features: int
    out_features: int

    @abstractmethod
    def input_weights(self) -> InputWeights | None:
        """What quantizing the input needs; None where it is not quantized."""

    def quantize(self, x: Tensor | ScaledFP8) -> QuantizedInput:
        """(..., K) -> what the products below read."""
        bound = self.binding()
        if isinstance(x, ScaledFP8):
            return bound.kernels.quantize_fp8(x, bound.input_weights)
        return bound.kernels.quantize(x, bound.input_weights)

    def norm_modulate_quantize(self, x: Tensor, scale: Tensor, shift: Tensor) -> QuantizedInput:
        """LayerNorm of x (B, L, K), modulation with (B, K) each, quantization."""
        bound = self.binding()
        return bound.kernels.norm_modulate_quantize(x, scale, shift, bound.input_weights)

    def product(self, x: QuantizedInput) -> Tensor:
        """(M, N)."""
        bound = self.binding()
        return bound.kernels.product(x, bound.product_weights)

    def product_gelu_quantize(self, x: QuantizedInput, following: FusedLinear) -> QuantizedInput:
        """The input of `following`: gelu(product), quantized."""
        bound = self.binding()
        return bound.kernels.product_gelu_quantize(x, bound.product_weights, following.binding().input_weights)

    def product_norm_rope(
        self, x: QuantizedInput, norm_q: Tensor, norm_k: Tensor, rotary: Rotary
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalized and rotated q, k, and v, each (B, H, L, D), from a linear that stacks all three."""
        bound = self.binding()
        return bound.kernels.product_norm_rope(x, bound.product_weights, norm_q, norm_k, rotary)

    def product_norm_rope_into(
        self,
        x: QuantizedInput,  # B * L rows
        norm_q: Tensor,
        norm_k: Tensor,
        rotary: Rotary,  # (L, D) each
        heads: Tensor,  # (3, B, H, L_total, D): q, k, v
        offset: int,
    ) -> None:
        """The same for a part of the tokens, written to heads[:, :, :, offset : offset + L]."""
        bound = self.binding()
        if bound.kernels.product_norm_rope_into is not None:
            weights = bound.product_weights
            bound.kernels.product_norm_rope_into(x, weights, norm_q, norm_k, rotary, heads, offset)
            return
        fused.write_heads(self.product_norm_rope(x, norm_q, norm_k, rotary), heads, offset)

    def product_gate_residual(self, x: QuantizedInput, residual: Tensor, gate: Tensor) -> Tensor:
        """Residual (B, L, N) + gate (B, N) * product."""
        bound = self.binding()
        return bound.kernels.product_gate_residual(x, bound.product_weights, residual, gate)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), as `torch.nn.Linear`."""
        return self.product(self.quantize(x)).reshape(*x.shape[:-1], self.out_features)


_LARGEST_JOINT_RANK, _RANK_STEP = 256, 16
"""What kernels take of branches side by side: so many columns, parts that begin at a whole step."""


class SharedInput:
    """Linears that read the same input: it is quantized once for all of them if their smoothing factors agree."""

    def __init__(self, *linears: FusedLinear) -> None:
        self._linears = linears
        # Weak references: an offloaded linear's weights must not stay on the device for the sake of this comparison.
        self._packed_for: tuple[weakref.ref[Binding], ...] = ()
        self._packed: Any | None = None

    def _joint(self) -> Any | None:
        """The packed input weights of all linears together, or None if each must quantize for itself."""
        bindings = tuple(linear.binding() for linear in self._linears)
        if tuple(ref() for ref in self._packed_for) != bindings:
            self._packed = self._pack(bindings)
            self._packed_for = tuple(weakref.ref(binding) for binding in bindings)
        return self._packed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed_for": (), "_packed": None}

    def _pack(self, bindings: tuple[Binding, ...]) -> Any | None:
        inputs = [w for linear in self._linears if (w := linear.input_weights()) is not None]
        ranks = [w.proj_down.shape[1] for w in inputs]
        if sum(ranks) > _LARGEST_JOINT_RANK or any(rank % _RANK_STEP for rank in ranks):
            return None
        first = inputs[0] if inputs else None
        if first is None or len(inputs) < len(bindings):
            return None
        for other in inputs[1:]:
            same_kind = (other.unsigned, other.activations) == (first.unsigned, first.activations)
            if not same_kind or not torch.equal(other.smooth_factor, first.smooth_factor):
                return None
        proj_down = torch.cat([w.proj_down for w in inputs], dim=1)
        joint = InputWeights(first.smooth_factor, proj_down, first.unsigned, first.activations)
        return bindings[0].kernels.pack_input(joint)

    def norm_modulate_quantize(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[QuantizedInput, ...]:
        """LayerNorm of x (B, L, K), modulation with (B, K) each, quantization: the input of each linear."""
        joint = self._joint()
        if joint is None:
            return tuple(linear.norm_modulate_quantize(x, scale, shift) for linear in self._linears)
        quantized = self._linears[0].binding().kernels.norm_modulate_quantize(x, scale, shift, joint)
        weights = [w for linear in self._linears if (w := linear.input_weights()) is not None]
        return quantized.split(tuple(w.proj_down.shape[1] for w in weights))
