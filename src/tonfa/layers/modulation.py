"""Modulations: from the conditioning vector of each image to its shifts, scales and gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tonfa.dispatch import bind, default_activations
from tonfa.errors import FormatError
from tonfa.formats import GROUP_SIZE
from tonfa.layers.bound import Binding, BoundModule
from tonfa.layers.dense import DenseLinear
from tonfa.weights import W4A16Weights


class W4A16Linear(BoundModule):
    """y = x (codes * wscales + wzeros)^T + bias with unsigned 4-bit codes; activations stay in 16 bits."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        if in_features % GROUP_SIZE:
            raise FormatError(f"W4A16Linear: in_features = {in_features} is no multiple of the group size {GROUP_SIZE}")
        self.in_features, self.out_features = in_features, out_features

        def empty(*shape: int, dtype: torch.dtype = dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype), requires_grad=False)

        self.qweight = empty(out_features, in_features // 2, dtype=torch.uint8)
        self.wscales = empty(in_features // GROUP_SIZE, out_features)
        self.wzeros = empty(in_features // GROUP_SIZE, out_features)
        self.bias = empty(out_features)

    def weights(self) -> W4A16Weights:
        """The parameters as one object, without a copy."""
        return W4A16Weights(*(t.detach() for t in (self.qweight, self.wscales, self.wzeros, self.bias)))

    def _key(self) -> Tensor:
        return self.qweight

    def _bind(self) -> Binding:
        kernels = bind(self.qweight.device, default_activations(self.qweight.device))
        return Binding(kernels, None, kernels.pack_w4a16(self.weights()), self.qweight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        bound = self.binding()
        if x.ndim == 2:
            return bound.kernels.w4a16(x, bound.product_weights)
        rows = bound.kernels.w4a16(x.reshape(-1, self.in_features), bound.product_weights)
        return rows.reshape(*x.shape[:-1], self.out_features)


class Modulation(nn.Module):
    """`chunks` vectors for each image from linear(silu(conditioning)).

    Chunks are (shift, scale, gate), twice in a double block. Scales are returned as 1 + scale; `plus_one` says that the
    bias of a 4-bit linear holds the 1 already, as Nunchaku's and native checkpoints have it.
    """

    def __init__(
        self, hidden_size: int, chunks: int, linear: W4A16Linear | DenseLinear, *, plus_one: bool = True
    ) -> None:
        super().__init__()
        self.hidden_size, self.chunks, self.plus_one = hidden_size, chunks, plus_one
        self.linear = linear

    def forward(self, conditioning: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> `chunks` times (B, D)."""
        vectors = list(self.linear(functional.silu(conditioning)).chunk(self.chunks, dim=1))
        if isinstance(self.linear, DenseLinear) or not self.plus_one:
            for i in {1, self.chunks - 2}:
                vectors[i] = 1 + vectors[i]
        return tuple(vectors)
