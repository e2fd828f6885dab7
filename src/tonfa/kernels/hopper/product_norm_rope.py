"""product_norm_rope: q, k and v of some tokens, normalized and rotated, written where attention reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tonfa.errors import FormatError
from tonfa.kernels.cuda.contract import aligned, expect
from tonfa.kernels.hopper.activation import HopperActivation
from tonfa.kernels.hopper.packed_product import PackedProduct
from tonfa.kernels.hopper.product import Primitives
from tonfa.kernels.hopper.product_kernel import NORM_ROPE, NORM_ROPE_FP8, start
from tonfa.ops import fused
from tonfa.ops.activation import QuantizedActivation
from tonfa.ops.fused import Rotary

HEAD_DIM = 128
_ROTARY: Any = WeakTensorKeyDictionary()


def _rotary_table(rotary: Rotary) -> Tensor:
    """(L, D/2, 2) fp16 pairs of cos and sin; the last ones are kept as long as their cos lives."""
    table: Tensor | None = _ROTARY.get(rotary[0])
    if table is None:
        table = torch.stack([t[:, 0::2] for t in rotary], dim=2).to(torch.float16).contiguous()
        _ROTARY[rotary[0]] = table
    return table


def product_norm_rope(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: (B, H, L, D), in memory as (B, L, H, D)."""
    assert isinstance(x, HopperActivation)
    rows, columns = x.rows, w.out_features
    return fused.product_norm_rope_by(product_norm_rope_into, x, rows, w, columns, norm_q, norm_k, rotary)


def product_norm_rope_into(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
    heads: Tensor,  # (3, B, H, L_total, D), D contiguous
    offset: int,
) -> None:
    """Write q, k and v to heads[:, :, :, offset : offset + L]. Heads of other sizes than 128 are composed."""
    assert isinstance(x, HopperActivation)
    length, size = rotary[0].shape
    places = heads[:, :, :, offset : offset + length]
    if places.shape != (3, x.rows // max(length, 1), w.out_features // (3 * size), length, size):
        found = f"{x.rows} rows of {w.out_features} for {length} tokens"
        raise FormatError(f"product_norm_rope: {found} do not fit {tuple(heads.shape)} from {offset} on")
    if size != HEAD_DIM or w.columns != w.out_features or heads.stride(4) != 1:
        fused.product_norm_rope_into(Primitives, x, w, norm_q, norm_k, rotary, heads, offset)
        return
    start_heads(x, w, *norm_weights(x, norm_q, norm_k), rotary, places)


def norm_weights(
    x: HopperActivation,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
) -> tuple[Tensor, Tensor]:
    """They as kernels read them: of x's dtype, aligned."""
    q, k = (aligned(norm.to(x.dtype)) for norm in (norm_q, norm_k))
    for name, norm in (("norm_q", q), ("norm_k", k)):
        expect(f"product_norm_rope: {name}", norm, (HEAD_DIM,), x.dtype, x.codes.device)
    return q, k


@dataclass(frozen=True)
class Rounding:
    """Of heads to e4m3."""

    factors: Tensor  # (3,) float32: what q, k and v are multiplied with before
    bias: Tensor  # (N,) float32, in place of the weights' own


def start_heads(
    x: HopperActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,), see `norm_weights`
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
    places: Tensor,  # (3, B, H, L, D), D contiguous
    rounding: Rounding | None = None,
) -> None:
    """Normalize, rotate and write heads of 128 channels: in x's dtype, or rounded to e4m3."""
    q, k, v = places.unbind(0)
    device, length = x.codes.device, rotary[0].shape[0]
    table = _rotary_table(rotary)
    expect("product_norm_rope: the rotary table", table, (length, HEAD_DIM // 2, 2), torch.float16, device)
    start(
        x,
        w,
        NORM_ROPE if rounding is None else NORM_ROPE_FP8,
        bias=None if rounding is None else rounding.bias,
        factors=None if rounding is None else rounding.factors.data_ptr(),
        out=q.data_ptr(),
        out_k=k.data_ptr(),
        out_v=v.data_ptr(),
        norm_q=norm_q.data_ptr(),
        norm_k=norm_k.data_ptr(),
        rotary=table.data_ptr(),
        batch_stride=q.stride(0),
        token_stride=q.stride(2),
        head_stride=q.stride(1),
        heads=q.shape[1],
        length=q.shape[2],
    )
