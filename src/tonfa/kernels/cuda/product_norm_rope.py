"""product_norm_rope: RMSNorm, RoPE and the split into heads in the product's epilogue (device/product_norm_rope.cu)."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.cuda.contract import aligned, expect
from tonfa.kernels.cuda.kernel import Kernel, Struct, specialize
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.cuda.primitives import Primitives
from tonfa.kernels.cuda.product import THREADS, TILE, PackedProduct, Product, product_struct, tile_grid
from tonfa.ops import fused
from tonfa.ops.activation import QuantizedActivation
from tonfa.ops.fused import RMS_NORM_EPS, Rotary


class Heads(Struct):
    """Norms, rotation and where the heads go."""

    _fields_ = [  # noqa: RUF012
        ("out", c_void_p),
        ("norm_q", c_void_p),
        ("norm_k", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("which_stride", c_int64),
        ("image_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("length", c_int32),
        ("heads", c_int32),
        ("epsilon", c_float),
    ]


@lru_cache(maxsize=8)
def kernel(dtype: torch.dtype, unsigned: bool) -> Kernel:
    """The kernel for inputs of this dtype."""
    return specialize("product_norm_rope", THREADS, Product, Heads, dtype=dtype, unsigned=unsigned)


def product_norm_rope(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: three times (B, H, L, D) of x's dtype; in memory (B, L, H, D), attention's own order."""
    rows, columns = x.codes.shape[0], w.out_features
    return fused.product_norm_rope_by(product_norm_rope_into, x, rows, w, columns, norm_q, norm_k, rotary)


def product_norm_rope_into(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
    heads: Tensor,  # (3, B, H, L_total, D) of x's dtype
    offset: int,
) -> None:
    """Write q, k and v of these tokens to heads[:, :, :, offset : offset + L].

    Heads of other sizes than 128, and places that 16-byte words do not fit, are composed.
    """
    rows, device, (length, size) = x.codes.shape[0], x.codes.device, rotary[0].shape
    if length == 0 or rows % length or w.out_features % (3 * size):
        found = f"{rows} rows of {w.out_features}"
        raise FormatError(f"product_norm_rope: {found} are no multiples of {length} tokens and 3 heads of {size}")
    places = heads[:, :, :, offset : offset + length]
    count = w.out_features // (3 * size)
    expect("product_norm_rope: heads", places, (3, rows // length, count, length, size), x.dtype, device)
    for name, norm in (("norm_q", norm_q), ("norm_k", norm_k)):
        expect(f"product_norm_rope: {name}", norm, (size,), norm.dtype, device)
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        expect(f"product_norm_rope: {name}", table, (length, size), table.dtype, device)
    strides = places.stride()
    if size != TILE or strides[4] != 1 or any(s % 8 for s in strides[:4]) or places.data_ptr() % 16:
        fused.product_norm_rope_into(Primitives, x, w, norm_q, norm_k, rotary, heads, offset)
        return
    parameters, _kept = product_struct(x, w)
    if rows:
        norms = [aligned(norm.to(x.dtype)) for norm in (norm_q, norm_k)]
        tables = [aligned(table.float()) for table in rotary]
        pointers = (t.data_ptr() for t in (places, *norms, *tables))
        epilogue = Heads(*pointers, *strides[:4], length, count, RMS_NORM_EPS)
        launch(kernel(x.dtype, w.unsigned), device, tile_grid(rows, w.columns), parameters, epilogue)
