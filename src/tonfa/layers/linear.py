"""SVDQLinear: a linear with 4-bit weights, a 16-bit low-rank branch and quantized activations, for any model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tonfa.dispatch import bind, default_activations
from tonfa.errors import FormatError, UnsupportedError
from tonfa.formats import GROUP_SIZE
from tonfa.layers.bound import Binding
from tonfa.layers.fused import FusedLinear
from tonfa.ops.activation import InputWeights, parse_activations
from tonfa.ops.table import Residency, parse_residency
from tonfa.quantizer.recipe import DEFAULT_RANK, Recipe, quantize_linear
from tonfa.weights import SVDQWeights


class SVDQLinear(FusedLinear):
    """y = Q(x / smooth_factor) (codes * wscales)^T + (x proj_down) proj_up^T + bias (SVDQuant, arXiv 2411.05007).

    Parameters have the canonical layout of `tonfa.weights.SVDQWeights`. `activations` chooses how the input is
    quantized ("int4", "int8", "fp8", "none"); None takes the default of the device at first use. `backend` forces one
    of `tonfa.dispatch.BACKENDS`. `unsigned` marks a linear behind a GELU.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = DEFAULT_RANK,
        *,
        unsigned: bool = False,
        activations: str | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if in_features % GROUP_SIZE:
            raise FormatError(f"SVDQLinear: in_features = {in_features} is no multiple of the group size {GROUP_SIZE}")
        if activations is not None:
            parse_activations(activations)
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.unsigned, self.activations, self.backend = unsigned, activations, backend
        self.weights_in_memory: Residency = "int4"

        def empty(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.qweight = empty(out_features, in_features // 2, dtype=torch.uint8)
        self.wscales = empty(in_features // GROUP_SIZE, out_features)
        self.smooth_factor = empty(in_features)
        self.proj_down = empty(in_features, rank)
        self.proj_up = empty(out_features, rank)
        self.bias = empty(out_features)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = DEFAULT_RANK,
        *,
        unsigned: bool = False,
        activations: str | None = None,
        backend: str | None = None,
        recipe: Recipe | None = None,
    ) -> SVDQLinear:
        """Quantize a `torch.nn.Linear` without calibration data; the result is on its device, in its dtype.

        float32 linears keep float32 scales and branches. Raises FormatError if in_features is no multiple of 64 or the
        rank exceeds the smaller side, and ValueError for NaN or Inf in the weights.
        """
        recipe = Recipe(rank=rank) if recipe is None else recipe
        bias = None if linear.bias is None else linear.bias.detach()
        weights = quantize_linear(linear.weight.detach(), bias, recipe, unsigned=unsigned)
        return cls.from_weights(weights, activations=activations, backend=backend)

    @classmethod
    def from_weights(
        cls, weights: SVDQWeights, *, activations: str | None = None, backend: str | None = None
    ) -> SVDQLinear:
        """Take over tensors in the canonical layout, without a copy."""
        weights.check("SVDQLinear")
        layer = cls(
            weights.in_features,
            weights.out_features,
            weights.rank,
            unsigned=weights.unsigned,
            activations=activations,
            backend=backend,
            device="meta",
            dtype=weights.wscales.dtype,
        )
        layer.load_state_dict(weights.tensors(), assign=True)
        return layer.requires_grad_(False)

    def weights(self) -> SVDQWeights:
        """The parameters as one object, without a copy."""
        return SVDQWeights(
            self.qweight.detach(),
            self.wscales.detach(),
            self.smooth_factor.detach(),
            self.proj_down.detach(),
            self.proj_up.detach(),
            self.bias.detach(),
            self.unsigned,
        )

    def set_activations(self, activations: str | None, backend: str | None = None) -> None:
        """Change the activation policy and the backend; the next call binds anew."""
        if activations is not None:
            parse_activations(activations)
        self.activations, self.backend = activations, backend
        self.unbind()

    def set_weights(self, weights: str) -> None:
        """Keep the weights in 4 bits alone ("int4"), or expanded beside them ("fp8", three times the size).

        The outputs are equal. Raises UnsupportedError for another name here, and at binding where the backend has no
        such form.
        """
        self.weights_in_memory = parse_residency(weights)
        self.unbind()

    def _policy(self) -> str:
        return self.activations or default_activations(self.qweight.device)

    def _key(self) -> Tensor:
        return self.qweight

    def _bind(self) -> Binding:
        kernels = bind(self.qweight.device, self._policy(), self.backend)
        pack = kernels.pack_product if self.weights_in_memory == "int4" else kernels.pack_product_expanded
        if pack is None:
            raise UnsupportedError(
                f"weights={self.weights_in_memory!r}: the {kernels.backend} backend with activations="
                f"{kernels.activations!r} multiplies 4-bit weights only; use set_weights('int4')"
            )
        packed = pack(self.weights())
        return Binding(kernels, kernels.pack_input(self.input_weights()), packed, self.qweight)

    def input_weights(self) -> InputWeights:
        """What quantizing the input needs."""
        policy = bind(self.qweight.device, self._policy(), self.backend).activations
        return InputWeights(self.smooth_factor.detach(), self.proj_down.detach(), self.unsigned, policy)

    def extra_repr(self) -> str:
        """Sizes and policy, for printing the module."""
        policy = self.activations or "default"
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, {policy=}"
