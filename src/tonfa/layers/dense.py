"""A linear with 16-bit weights behind the interface of the quantized one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tonfa.dispatch import bind_dense
from tonfa.layers.bound import Binding
from tonfa.layers.fused import FusedLinear


class DenseLinear(FusedLinear):
    """weight (N, K) and bias (N,), as `torch.nn.Linear` holds them."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype), False)
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype), False)

    def _key(self) -> Tensor:
        return self.weight

    def _bind(self) -> Binding:
        return Binding(bind_dense(), None, (self.weight, self.bias), self.weight)

    def input_weights(self) -> None:
        """A dense linear's input is not quantized."""
        return
