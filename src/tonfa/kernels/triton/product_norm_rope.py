"""product_norm_rope: RMSNorm and RoPE of q and k in the product's epilogue, written where attention reads them.

A tile is whole heads wide and holds a pair (2i, 2i + 1) in one thread. q, k and v have the shape (B, H, L, D) and lie
in memory as (B, L, H, D), the order in which attention kernels return their output: it needs no transposition.
4608 x 9216: 85 MB written once; unfused, the product's output is written, read, and q, k, v written again.
"""

from __future__ import annotations

from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.triton.product import PackedProduct, run
from tonfa.ops.activation import QuantizedActivation
from tonfa.ops.fused import Rotary, product_norm_rope_by


def product_norm_rope_into(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
    out: Tensor,  # (3, B, H, L_total, D), D contiguous
    offset: int,
) -> None:
    """Write q, k and v of these tokens to out[:, :, :, offset : offset + L]."""
    (length, size), m, n = rotary[0].shape, x.codes.shape[0], w.shape[0]
    if length == 0 or m % length or n % (3 * size) or size not in (16, 32, 64, 128):
        raise FormatError(f"product_norm_rope: {m} rows of {n} do not divide into q, k, v of ({length}, {size})")
    target = out[:, :, :, offset : offset + length]
    if target.shape != (3, m // length, n // (3 * size), length, size) or target.stride(4) != 1:
        raise FormatError(f"product_norm_rope: no place for {m} rows in {tuple(out.shape)} from {offset} on")
    cos, sin = (t if t.stride() == (size, 1) else t.contiguous() for t in rotary)
    run(x, w, "heads", target, length=length, norms=(norm_q, norm_k), rotary=(cos, sin))


def product_norm_rope(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each (B, H, L, D) of x's dtype."""
    rows, columns = x.codes.shape[0], w.shape[0]
    return product_norm_rope_by(product_norm_rope_into, x, rows, w, columns, norm_q, norm_k, rotary)
