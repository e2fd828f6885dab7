"""The fused ops: each is the composition of the ops that it fuses, and has no mathematics of its own.

A backend that has a kernel for one of them replaces the composition; the composition over the reference ops is the
specification of that kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.ops.activation import QuantizedActivation, ScaledFP8

LAYER_NORM_EPS = 1e-6
RMS_NORM_EPS = 1e-6

Rotary = tuple[Tensor, Tensor]
"""cos and sin, each (L, D) float32 with every angle twice in a row, as Diffusers' FluxPosEmbed gives them."""


@dataclass(frozen=True)
class Projection:
    """The arguments of `product_norm_rope`: what makes q, k and v of some tokens."""

    x: QuantizedActivation  # B * L rows
    w: Any
    norm_q: Tensor  # (D,)
    norm_k: Tensor  # (D,)
    rotary: Rotary  # (L, D) each


class Primitives(Protocol):
    """The two ops that the fused ones are made of. `Any` is what a backend packed from the weights."""

    def quantize(self, x: Tensor, w: Any) -> QuantizedActivation:
        """See ops/quantize.py."""
        ...

    def product(self, x: QuantizedActivation, w: Any) -> Tensor:
        """See ops/product.py."""
        ...


def norm_modulate(
    x: Tensor,  # (B, L, K)
    scale: Tensor,  # (B, K), holds the 1 of "1 + scale"
    shift: Tensor,  # (B, K)
) -> Tensor:
    """LayerNorm(x) * scale + shift in float32, rounded once to x's dtype."""
    normed = functional.layer_norm(x.float(), (x.shape[-1],), eps=LAYER_NORM_EPS)
    return torch.addcmul(shift.float().unsqueeze(1), normed, scale.float().unsqueeze(1)).to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form, float32 inside."""
    return functional.gelu(x.float(), approximate="tanh").to(x.dtype)


def norm_rope(
    x: Tensor,  # (B, L, H, D)
    norm_weight: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
) -> Tensor:
    """RMSNorm over D, then rotary embedding of the pairs (2i, 2i+1), in float32: (B, H, L, D) of x's dtype."""
    cos, sin = (t.float().unsqueeze(1) for t in rotary)
    y = functional.rms_norm(x.float(), (x.shape[-1],), norm_weight.float(), RMS_NORM_EPS)
    real, imaginary = y.unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((-imaginary, real), dim=-1).flatten(-2)
    return (y * cos + rotated * sin).to(x.dtype).transpose(1, 2)


def heads_norm_rope(
    y: Tensor,  # (B * L, 3 * H * D): q, k and v side by side
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and RoPE of q and k; heads apart: three times (B, H, L, D)."""
    length, head_dim = rotary[0].shape
    q, k, v = y.unflatten(0, (-1, length)).unflatten(2, (3, -1, head_dim)).unbind(2)
    return norm_rope(q, norm_q, rotary), norm_rope(k, norm_k, rotary), v.transpose(1, 2)


def empty_heads(batch: int, heads: int, length: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3, B, H, L, D) for q, k and v, uninitialized; in memory (B, L, H, D), in which attention returns its output."""
    return torch.empty((3, batch, length, heads, head_dim), dtype=dtype, device=device).transpose(2, 3)


def write_heads(
    values: Sequence[Tensor],  # q, k, v: (B, H, L, D) each
    heads: Tensor,  # (3, B, H, L_total, D)
    offset: int,
) -> None:
    """Copy q, k and v to heads[:, :, :, offset : offset + L]."""
    for place, value in zip(heads[:, :, :, offset : offset + values[0].shape[2]], values, strict=True):
        place.copy_(value)


def gate_residual(
    y: Tensor,  # (B, L, N)
    residual: Tensor,  # (B, L, N)
    gate: Tensor,  # (B, N)
) -> Tensor:
    """Residual + gate * y in float32, rounded once; float16 is kept finite, as Diffusers does."""
    out = torch.addcmul(residual.float(), y.float(), gate.float().unsqueeze(1))
    if residual.dtype == torch.float16:
        out = out.clamp_(-65504, 65504)
    return out.to(residual.dtype)


def quantize_fp8(ops: Primitives, x: ScaledFP8, w: Any) -> QuantizedActivation:
    """`quantize` of an input that is in e4m3."""
    return ops.quantize(x.dequantize(), w)


def norm_modulate_quantize(
    ops: Primitives,
    x: Tensor,  # (B, L, K)
    scale: Tensor,  # (B, K), holds the 1 of "1 + scale"
    shift: Tensor,  # (B, K)
    w: Any,
) -> QuantizedActivation:
    """LayerNorm, modulation and quantization of the next input."""
    return ops.quantize(norm_modulate(x, scale, shift), w)


def product_gelu_quantize(ops: Primitives, x: QuantizedActivation, w: Any, following: Any) -> QuantizedActivation:
    """Product, GELU and quantization of the next input."""
    return ops.quantize(gelu(ops.product(x, w)), following)


def product_norm_rope(
    ops: Primitives,
    x: QuantizedActivation,  # B * L rows
    w: Any,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
) -> tuple[Tensor, Tensor, Tensor]:
    """Product with stacked q, k, v; RMSNorm and RoPE of q and k; heads apart: three times (B, H, L, D)."""
    return heads_norm_rope(ops.product(x, w), norm_q, norm_k, rotary)


def product_norm_rope_by(
    into: Callable[..., None],
    x: QuantizedActivation,
    rows: int,  # of x, B * L
    w: Any,
    columns: int,  # of w, 3 * H * D
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by a backend's `product_norm_rope_into`, which checks what it is given."""
    length, size = rotary[0].shape
    heads = empty_heads(rows // max(length, 1), columns // (3 * size), length, size, x.dtype, x.codes.device)
    into(x, w, norm_q, norm_k, rotary, heads, 0)
    q, k, v = heads.unbind(0)
    return q, k, v


def product_norm_rope_into(
    ops: Primitives,
    x: QuantizedActivation,  # B * L rows
    w: Any,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
    heads: Tensor,  # (3, B, H, L_total, D)
    offset: int,
) -> None:
    """The same for a part of the tokens, written to heads[:, :, :, offset : offset + L]."""
    write_heads(product_norm_rope(ops, x, w, norm_q, norm_k, rotary), heads, offset)


def product_gate_residual(
    ops: Primitives,
    x: QuantizedActivation,  # B * L rows
    w: Any,
    residual: Tensor,  # (B, L, N)
    gate: Tensor,  # (B, N)
) -> Tensor:
    """Product, gate and residual: (B, L, N)."""
    return gate_residual(ops.product(x, w).view(residual.shape), residual, gate)
