"""Scalar building blocks of the CPU kernels, as LLVM instructions that vectorize.

16-bit floats have no type in Numba: arrays hold them as integers, uint16 for bfloat16 and int16 for float16, and the
array's type picks the conversion. `rint` is LLVM's (round half to even, as torch), NumPy's would stay a call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from tonfa.errors import FormatError

_ELEMENTS: dict[torch.dtype, type[np.generic]] = {
    torch.bfloat16: np.uint16,
    torch.float16: np.int16,
    torch.float32: np.float32,
}

_I32, _I64, _F16, _F32 = ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()


def element_type(dtype: torch.dtype) -> type[np.generic]:
    """The NumPy type that kernels see for a tensor's dtype."""
    if dtype not in _ELEMENTS:
        raise FormatError(f"the CPU kernels read bfloat16, float16 and float32, not {dtype}; convert the tensor")
    return _ELEMENTS[dtype]


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """int64 -> void pointer, for `numba.carray`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def claim(typing_context: Any, counter: Any, count: Any) -> Any:
    """Add `count` to the shared int64 counter, atomically, and return what it was."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", args[0], args[1], "monotonic")

    return types.int64(types.CPointer(types.int64), types.int64), codegen


@intrinsic
def to_float(typing_context: Any, value: Any) -> Any:
    """An array element -> float32, exactly."""

    def from_bfloat16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _F32)

    def from_float16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], _F16), _F32)

    def from_float32(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    codegens = {types.uint16: from_bfloat16, types.int16: from_float16, types.float32: from_float32}
    return types.float32(value), codegens[value]


@intrinsic
def round_to(typing_context: Any, value: Any, like: Any) -> Any:
    """float32 -> the type of the array element `like`, rounded half to even; NaN stays NaN."""

    def to_bfloat16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        rounded = builder.select(is_nan, ir.Constant(_I32, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, ir.Constant(_I32, 16)), ir.IntType(16))

    def to_float16(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], _F16), ir.IntType(16))

    def to_float32(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    codegens = {types.uint16: to_bfloat16, types.int16: to_float16, types.float32: to_float32}
    return like(types.float32, like), codegens[like]


@intrinsic
def rint(typing_context: Any, value: Any) -> Any:
    """float32 -> the nearest integer as float32, halves to even."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [_F32]), [args[0]])

    return types.float32(types.float32), codegen


@intrinsic
def bits(typing_context: Any, value: Any) -> Any:
    """The bits of a float32 as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def from_bits(typing_context: Any, value: Any) -> Any:
    """The float32 with these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), codegen


@njit(error_model="numpy")
def magnitude(value: Any) -> Any:
    """The bits of |value|, ordered as the magnitudes are (NaN above all): integer maxima vectorize, float's do not."""
    return bits(value) & np.uint32(0x7FFFFFFF)


@njit(error_model="numpy")
def reciprocal_or_zero(scale: Any) -> Any:
    """1 / scale, and 0 for the scale of nothing but zeros, as `formats` defines it."""
    return np.float32(1) / scale if scale > 0 else np.float32(0)


@njit(error_model="numpy")
def quantize_row(row: Any, codes: Any) -> Any:
    """formats.INT8 on one row: float32 (K,) -> writes int8 (K,), returns the scale."""
    top = np.uint32(0)
    for k in range(row.shape[0]):
        top = max(top, magnitude(row[k]))
    scale = from_bits(top) * np.float32(1 / 127)
    reciprocal = reciprocal_or_zero(scale)
    for k in range(row.shape[0]):
        codes[k] = np.int8(rint(row[k] * reciprocal))
    return scale


@njit(error_model="numpy", fastmath={"reassoc", "contract"})
def total(row: Any) -> Any:
    """The sum of a float32 row, in any order."""
    result = np.float32(0)
    for k in range(row.shape[0]):
        result += row[k]
    return result


@njit(error_model="numpy", fastmath={"reassoc", "contract"})
def total_square(row: Any, center: Any) -> Any:
    """The sum of (row - center)^2, in any order."""
    result = np.float32(0)
    for k in range(row.shape[0]):
        result += (row[k] - center) * (row[k] - center)
    return result


@njit(error_model="numpy", fastmath={"reassoc", "contract"})
def dot(left: Any, right: Any) -> Any:
    """The sum of left * right, in any order."""
    result = np.float32(0)
    for k in range(left.shape[0]):
        result += left[k] * right[k]
    return result


@njit(error_model="numpy")
def exp(x: Any) -> Any:
    """e^x to 2 units in the last place for -87 <= x <= 88, clamped beyond; libm's would be a call for each element."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = rint(x * np.float32(1.4426950408889634))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * from_bits(np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)))


@njit(error_model="numpy")
def gelu(x: Any) -> Any:
    """GELU in its tanh form: x times the sigmoid of 2 sqrt(2/pi) (x + 0.044715 x^3)."""
    inner = np.float32(-1.5957691216057308) * (x + np.float32(0.044715) * x * x * x)
    return x / (np.float32(1) + exp(inner))
