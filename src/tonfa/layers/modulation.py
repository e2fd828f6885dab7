"""Modulations: from the conditioning vector of each image to its shifts, scales and gates."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

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
        self._named: tuple[str | None, str] | None = None

    def weights(self) -> W4A16Weights:
        """The parameters as one object, without a copy."""
        return W4A16Weights(*(t.detach() for t in (self.qweight, self.wscales, self.wzeros, self.bias)))

    def _key(self) -> Tensor:
        return self.qweight

    def set_backend(self, activations: str | None, backend: str | None) -> None:
        """Name the backend and a policy that it has; without a name the device's default computes."""
        self._named = None if backend is None else (activations, backend)
        self.unbind()

    def _bind(self) -> Binding:
        device = self.qweight.device
        activations, backend = self._named or (None, None)
        kernels = bind(device, activations or default_activations(device), backend)
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

    def forward(self, conditioning: Tensor, joined: Tensor | None = None) -> tuple[Tensor, ...]:
        """(B, D) -> `chunks` times (B, D); `joined` is linear(silu(conditioning)) where it is computed already."""
        if joined is None:
            joined = self.linear(functional.silu(conditioning))
        vectors = list(joined.chunk(self.chunks, dim=1))
        if isinstance(self.linear, DenseLinear) or not self.plus_one:
            for i in {1, self.chunks - 2}:
                vectors[i] = 1 + vectors[i]
        return tuple(vectors)


class SharedConditioning:
    """The linears of modulations that read the same conditioning vector: one launch for all, where that is possible.

    It is not where weights come later or lie elsewhere (offloading, several GPUs) or the linears differ in kind; each
    modulation then computes its own.
    """

    def __init__(self) -> None:
        self._packed: tuple[tuple[weakref.ref[Binding], ...], Any] = (), None

    def __getstate__(self) -> dict[str, Any]:
        return {"_packed": ((), None)}

    def __call__(self, modulations: Sequence[Modulation], conditioning: Tensor) -> list[Tensor | None]:
        """(B, D) -> linear(silu(conditioning)) of each modulation, or None for each."""
        linears = [modulation.linear for modulation in modulations]
        bindings = _alike(linears, conditioning)
        if not bindings:
            return [None] * len(linears)
        kernels, (packed_for, packed) = bindings[0].kernels, self._packed
        if tuple(ref() for ref in packed_for) != bindings:
            packed = kernels.pack_w4a16_group([binding.product_weights for binding in bindings])
            self._packed = tuple(weakref.ref(binding, self._forget) for binding in bindings), packed
        return list(kernels.w4a16_group(functional.silu(conditioning), packed))

    def _forget(self, _: weakref.ref[Binding]) -> None:
        """Weights that are moved away must not stay in memory for the sake of this."""
        self._packed = (), None


def _alike(linears: Sequence[W4A16Linear | DenseLinear], x: Tensor) -> tuple[Binding, ...]:
    """The bindings of 4-bit linears that one launch can take; none otherwise."""
    quantized = [linear for linear in linears if isinstance(linear, W4A16Linear)]
    kinds = {(linear.in_features, linear.wscales.dtype) for linear in quantized}
    present = all(linear.qweight.device == x.device for linear in quantized)
    if len(quantized) < len(linears) or len(kinds) != 1 or not present:
        return ()
    bindings = tuple(linear.binding() for linear in quantized)
    return bindings if all(b.kernels is bindings[0].kernels for b in bindings) else ()
