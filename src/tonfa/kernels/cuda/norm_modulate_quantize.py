"""norm_modulate_quantize: LayerNorm and modulation on the way into quantization (device/norm_modulate_quantize.cu)."""

from __future__ import annotations

from ctypes import c_float, c_int32, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.cuda.contract import aligned, expect
from tonfa.kernels.cuda.kernel import Kernel, Struct, specialize
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.cuda.quantize import (
    THREADS,
    PackedInput,
    Quantize,
    check_rows,
    empty_activation,
    quantize_grid,
    quantize_struct,
)
from tonfa.ops.activation import QuantizedActivation
from tonfa.ops.fused import LAYER_NORM_EPS


class Norm(Struct):
    """What is normalized, and its modulation."""

    _fields_ = [  # noqa: RUF012
        ("x", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("length", c_int32),
        ("epsilon", c_float),
    ]


@lru_cache(maxsize=32)
def kernel(dtype: torch.dtype, unsigned: bool, rank_chunk: int) -> Kernel:
    """The kernel for inputs of this dtype."""
    values = {"unsigned": unsigned, "rank_chunk": rank_chunk}
    return specialize("norm_modulate_quantize", THREADS, Quantize, Norm, dtype=dtype, **values)


def norm_modulate_quantize(
    x: Tensor,  # (B, L, K) bf16 or fp16
    scale: Tensor,  # (B, K) of x's dtype, holds the 1 of "1 + scale"
    shift: Tensor,  # (B, K) of x's dtype
    w: PackedInput,
) -> QuantizedActivation:
    """Codes (B * L, K/2) uint8, scales (B * L, K/G), lowrank (B * L, R) float32."""
    if x.ndim != 3:
        raise FormatError(f"norm_modulate_quantize: expected x of shape (B, L, K), got {tuple(x.shape)}")
    rows = check_rows(x, w, "norm_modulate_quantize")
    batch, length, channels = x.shape
    expect("norm_modulate_quantize: scale", scale, (batch, channels), x.dtype, x.device)
    expect("norm_modulate_quantize: shift", shift, (batch, channels), x.dtype, x.device)
    out = empty_activation(rows.shape[0], w)
    if rows.shape[0]:
        scale, shift = aligned(scale), aligned(shift)
        norm = Norm(rows.data_ptr(), scale.data_ptr(), shift.data_ptr(), length, LAYER_NORM_EPS)
        chosen = kernel(x.dtype, w.unsigned, w.rank_chunk)
        launch(chosen, x.device, quantize_grid(rows.shape[0], w), quantize_struct(out, w), norm)
    return out
