"""Device functions that several kernels share.

Triton's interpreter, which runs the kernels on a CPU, has no inline assembly and converts float32 to e4m3 wrongly; it
gets the same functions in integer arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it rounds a float32 below 2^22 to an integer, half to even, in the low bits of the sum."""


@triton.jit
def byte_permute(low, high, selector):
    """PTX prmt: nibble i of `selector` names byte i of the result in (high, low); with bit 3, eight times its sign."""
    if INTERPRETED:
        both = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(tl.uint64)
        result = (low & 0).to(tl.uint64)
        for i in tl.static_range(4):
            choice = ((selector >> (4 * i)) & 15).to(tl.uint64)
            byte = (both >> ((choice & 7) * 8)) & 255
            byte = tl.where((choice & 8) != 0, (byte >> 7) * 255, byte)
            result = result | (byte << (8 * i))
        return result.to(tl.uint32).to(tl.int32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selector], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def e4m3_bits(x):
    """float32 -> int32 in 0..255: e4m3, rounded half to even, the largest number where it is too large."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    units = (tl.abs(x) * 512.0 + ROUND).to(tl.int32, bitcast=True) & 15
    code = tl.where(magnitude < 0x3C800000, units, tl.minimum(normal, 0x7E))
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def to_e4m3(x):
    """float32 -> e4m3, half to even, saturating."""
    if INTERPRETED:
        return e4m3_bits(x).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return x.to(tl.float8e4nv)


@triton.jit
def to_int8(x):
    """float32 in [-127.5, 127.5] -> int8, half to even."""
    return (tl.clamp(x, -127.0, 127.0) + ROUND).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def pack_e4m3(a, b, c, d):
    """Four float32 -> int32 of four e4m3, `a` in the lowest byte."""
    if INTERPRETED:
        return e4m3_bits(a) | (e4m3_bits(b) << 8) | (e4m3_bits(c) << 16) | (e4m3_bits(d) << 24)
    else:
        return tl.inline_asm_elementwise(
            """
                {
                .reg .b16 low, high;
                cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
                cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
                mov.b32 $0, {low, high};
                }
                """,
            "=r,f,f,f,f",
            [a, b, c, d],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def pack_int8(a, b, c, d):
    """Four float32 in [-127.5, 127.5] -> int32 of four int8, `a` in the lowest byte."""
    a, b = to_int8(a).to(tl.int32) & 255, to_int8(b).to(tl.int32) & 255
    c, d = to_int8(c).to(tl.int32) & 255, to_int8(d).to(tl.int32)
    return a | (b << 8) | (c << 16) | (d << 24)


@triton.jit
def reciprocal_or_zero(scale):
    """1 / scale, correctly rounded; 0 where it would be infinite."""
    return tl.where(scale >= 1.2e-38, tl.div_rn(scale * 0.0 + 1.0, tl.maximum(scale, 1.2e-38)), 0.0)


@triton.jit
def gelu(x):
    """GELU in its tanh form: x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), the sigmoid 0 at exp(-80)."""
    return x * tl.sigmoid(tl.maximum(1.5957691216057308 * x * (1.0 + 0.044715 * x * x), -80.0))
