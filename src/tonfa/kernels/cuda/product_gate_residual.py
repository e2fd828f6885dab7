"""product_gate_residual: gate and residual in the product's epilogue (device/product_gate_residual.cu)."""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.cuda.contract import aligned, expect
from tonfa.kernels.cuda.kernel import Kernel, Struct, specialize
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.cuda.primitives import Primitives
from tonfa.kernels.cuda.product import THREADS, PackedProduct, Product, product_struct, tile_grid
from tonfa.ops import fused
from tonfa.ops.activation import QuantizedActivation


class Residual(Struct):
    """What the product is gated with and added to."""

    _fields_ = [("out", c_void_p), ("residual", c_void_p), ("gate", c_void_p), ("length", c_int32)]  # noqa: RUF012


@lru_cache(maxsize=8)
def kernel(dtype: torch.dtype, unsigned: bool) -> Kernel:
    """The kernel for inputs of this dtype."""
    return specialize("product_gate_residual", THREADS, Product, Residual, dtype=dtype, unsigned=unsigned)


def product_gate_residual(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    residual: Tensor,  # (B, L, N) of x's dtype
    gate: Tensor,  # (B, N) of x's dtype
) -> Tensor:
    """(B, L, N) of x's dtype."""
    if residual.ndim != 3 or residual.shape[0] * residual.shape[1] != x.codes.shape[0]:
        found = tuple(residual.shape)
        raise FormatError(f"product_gate_residual: {x.codes.shape[0]} rows do not fit a residual of shape {found}")
    batch, length, _ = residual.shape
    device = x.codes.device
    expect("product_gate_residual: residual", residual, (batch, length, w.out_features), x.dtype, device)
    expect("product_gate_residual: gate", gate, (batch, w.out_features), x.dtype, device)
    if w.columns != w.out_features:
        return fused.product_gate_residual(Primitives, x, w, residual, gate)
    parameters, _kept = product_struct(x, w)
    residual, gate = aligned(residual), aligned(gate)
    out = torch.empty_like(residual)
    if out.numel():
        epilogue = Residual(out.data_ptr(), residual.data_ptr(), gate.data_ptr(), length)
        grid = tile_grid(batch * length, w.columns)
        launch(kernel(x.dtype, w.unsigned), device, grid, parameters, epilogue)
    return out
