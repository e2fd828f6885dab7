"""The attention of a block: that of the backend of its layers, or the one that was chosen for the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tonfa.dispatch import bind_attention
from tonfa.layers.bound import BoundModule
from tonfa.ops.table import parse_attention


class Attention:
    """softmax(q k^T / sqrt(D)) v by the kernel chosen for the device that q is on, looked up once for each device."""

    def __init__(self) -> None:
        self.choice = "sdpa"
        self._bound: tuple[torch.device, Callable[..., Tensor] | None] | None = None

    def choose(self, choice: str) -> None:
        """One of `tonfa.ops.table.ATTENTIONS`. Raises UnsupportedError for an unknown one."""
        self.choice, self._bound = parse_attention(choice), None

    def __getstate__(self) -> dict[str, Any]:
        return {"choice": self.choice, "_bound": None}

    def __call__(
        self,
        layer: BoundModule,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, H, L, D)
        v: Tensor,  # (B, H, L, D)
        mask: Tensor | None,
        norm_q: Sequence[Tensor],  # (D,) each: the weights of the norms of parts of the tokens, which bound q
        norm_k: Sequence[Tensor],
    ) -> Tensor:
        """(B, L, H * D). `layer` is one whose backend computes where nothing else was chosen.

        Raises UnsupportedError where the chosen attention does not run on this device.
        """
        if self._bound is None or self._bound[0] != q.device:
            self._bound = q.device, bind_attention(q.device, self.choice)
        chosen = self._bound[1]
        if chosen is None:
            return layer.binding().kernels.attention(q, k, v, mask)
        return chosen(q, k, v, mask, norm_q, norm_k)
