"""product_norm_rope: RMSNorm, RoPE and the split into heads in the product's epilogue (device/product_norm_rope.cu)."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_void_p
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
    """q, k, v: three times (B, H, L, D) of x's dtype. Heads of other sizes than 128 are composed."""
    rows, device = x.codes.shape[0], x.codes.device
    length, size = rotary[0].shape
    if length == 0 or rows % length or w.out_features % (3 * size):
        found = f"{rows} rows of {w.out_features}"
        raise FormatError(f"product_norm_rope: {found} are no multiples of {length} tokens and 3 heads of {size}")
    if size != TILE:
        return fused.product_norm_rope(Primitives, x, w, norm_q, norm_k, rotary)
    for name, norm in (("norm_q", norm_q), ("norm_k", norm_k)):
        expect(f"product_norm_rope: {name}", norm, (size,), norm.dtype, device)
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        expect(f"product_norm_rope: {name}", table, (length, size), table.dtype, device)
    parameters, _kept = product_struct(x, w)
    batch, heads = rows // length, w.out_features // (3 * size)
    out = torch.empty((3, batch, heads, length, size), dtype=x.dtype, device=device)
    if rows:
        norms = [aligned(norm.to(x.dtype)) for norm in (norm_q, norm_k)]
        tables = [aligned(table.float()) for table in rotary]
        pointers = (t.data_ptr() for t in (out, *norms, *tables))
        epilogue = Heads(*pointers, length, heads, RMS_NORM_EPS)
        launch(kernel(x.dtype, w.unsigned), device, tile_grid(rows, w.columns), parameters, epilogue)
    q, k, v = out.unbind(0)
    return q, k, v
