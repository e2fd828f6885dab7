"""The attention of a block: its products make q, k and v in the form that the chosen attention reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tonfa.dispatch import bind_attention
from tonfa.layers.bound import BoundModule
from tonfa.layers.fused import FusedLinear, QuantizedInput
from tonfa.ops.activation import QuantizedActivation, ScaledFP8
from tonfa.ops.attention_fp8 import QuantizedHeads
from tonfa.ops.fused import Projection, Rotary, empty_heads
from tonfa.ops.table import DEFAULT_ATTENTION, AttentionKernels, parse_attention


@dataclass(frozen=True)
class Stream:
    """Tokens, and what makes q, k and v of them."""

    to_qkv: FusedLinear
    x: QuantizedInput  # B * L rows
    norm_q: Tensor  # (D,)
    norm_k: Tensor  # (D,)
    rotary: Rotary  # (L, D) each

    @property
    def length(self) -> int:
        """L."""
        return self.rotary[0].shape[0]


def _shape(streams: Sequence[Stream], like: Tensor) -> torch.Size:
    """(B, H, L, D) of all tokens."""
    size = streams[0].rotary[0].shape[1]
    heads = streams[0].to_qkv.out_features // (3 * size)
    return torch.Size((like.shape[0], heads, sum(stream.length for stream in streams), size))


def _heads(streams: Sequence[Stream], like: Tensor) -> tuple[Tensor, ...]:
    """q, k and v: (B, H, L, D) of like's dtype."""
    if len(streams) == 1:
        (s,) = streams
        return s.to_qkv.product_norm_rope(s.x, s.norm_q, s.norm_k, s.rotary)
    batch, heads, length, size = _shape(streams, like)
    joint = empty_heads(batch, heads, length, size, like.dtype, like.device)
    offset = 0
    for s in streams:
        s.to_qkv.product_norm_rope_into(s.x, s.norm_q, s.norm_k, s.rotary, joint, offset)
        offset += s.length
    return joint.unbind(0)


def _rounded_heads(streams: Sequence[Stream], chosen: AttentionKernels, like: Tensor) -> QuantizedHeads | None:
    """q, k and v in e4m3 straight from the products; None if the backend or the attention does not take them."""
    bindings, projections = [s.to_qkv.binding() for s in streams], []
    for s, bound in zip(streams, bindings, strict=True):
        if isinstance(s.x, QuantizedActivation):  # not one for each part of a linear
            projections.append(Projection(s.x, bound.product_weights, s.norm_q, s.norm_k, s.rotary))
    kernels = bindings[0].kernels
    if len(projections) < len(streams) or any(bound.kernels is not kernels for bound in bindings):
        return None
    if kernels.product_norm_rope_fp8 is None or not chosen.takes(_shape(streams, like), like.device):
        return None
    return kernels.product_norm_rope_fp8(projections)


class Attention:
    """softmax(q k^T / sqrt(D)) v by the kernels chosen for the device of the tokens, looked up once for each device."""

    def __init__(self) -> None:
        self.choice = DEFAULT_ATTENTION
        self._bound: tuple[torch.device, AttentionKernels | None] | None = None

    def choose(self, choice: str) -> None:
        """One of `tonfa.ops.table.ATTENTIONS`, or "auto". Raises UnsupportedError for an unknown one."""
        self.choice, self._bound = parse_attention(choice), None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bound": None}

    def _chosen(self, device: torch.device) -> AttentionKernels | None:
        if self._bound is None or self._bound[0] != device:
            self._bound = device, bind_attention(device, self.choice)
        return self._bound[1]

    def __call__(
        self,
        streams: Sequence[Stream],  # whose tokens attend to each other, in order
        mask: Tensor | None,
        like: Tensor,  # (B, any L, hidden): what batch, dtype and device are taken from
    ) -> Tensor | ScaledFP8:
        """(B, L, H * D) of all tokens, in the form that `FusedLinear.quantize` reads.

        Raises UnsupportedError where the chosen attention does not run on this device.
        """
        chosen = self._chosen(like.device)
        if chosen is not None and mask is None:
            rounded = _rounded_heads(streams, chosen, like)
            if rounded is not None:
                return chosen.attend(rounded, like.dtype)
        q, k, v = _heads(streams, like)
        norm_q, norm_k = [s.norm_q for s in streams], [s.norm_k for s in streams]
        return self.of_heads(streams[-1].to_qkv, q, k, v, mask, norm_q, norm_k)

    def of_heads(
        self,
        layer: BoundModule,
        q: Tensor,  # (B, H, L, D)
        k: Tensor,  # (B, H, L, D)
        v: Tensor,  # (B, H, L, D)
        mask: Tensor | None,
        norm_q: Sequence[Tensor],  # (D,) each: the weights of the norms of parts of the tokens, which bound q
        norm_k: Sequence[Tensor],
    ) -> Tensor:
        """(B, L, H * D) from 16-bit heads. `layer` is one whose backend computes where nothing else was chosen."""
        chosen = self._chosen(q.device)
        if chosen is None:
            return layer.binding().kernels.attention(q, k, v, mask)
        return chosen.attention(q, k, v, mask, norm_q, norm_k)
