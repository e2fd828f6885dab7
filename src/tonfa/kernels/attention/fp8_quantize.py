"""q, k and v to e4m3 for attention_fp8 (see ops/attention_fp8.py): two kernels, bound by memory, behind v's mean.

The first finds the largest |v - mean| of each of PARTS pieces. The second rounds everything; every program looks at the
PARTS maxima and the few norm weights again, so no scale is a kernel of its own. At (1, 24, 4608, 128) they read 28 MB,
then 85 MB, of which v's third is still in the L2 cache, and write 42: 30 to 37 us at the 4.3 TB/s of an H200.

Heads and tokens lie in memory as (B, L, H, D), as projections write them and as cuDNN's own examples are laid out.
Nothing is added atomically: results do not depend on the order of the programs. Every exponent is an integer taken from
the bits of a float32, so results agree with the reference byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tonfa.ops.attention_fp8 import LARGEST_BOUND, P_SCALE, SCALARS, SMALLEST_BOUND, QuantizedHeads, center

PARTS = 512
"""Programs of the first pass: about four on each SM of a large GPU, all at once."""
MEASURED_ROWS, ROUNDED_ROWS = 64, 32
"""Heads of tokens that a program takes at a time."""
_SMALLEST = tl.constexpr(SMALLEST_BOUND)
_LARGEST = tl.constexpr(LARGEST_BOUND)
_P_SCALE = tl.constexpr(P_SCALE)


@triton.jit
def _largest_exponent(bound):
    """The largest n with bound * 2^n <= 448 = 1.75 * 2^8, from the bits of a float32."""
    bits = tl.clamp(bound, _SMALLEST, _LARGEST).to(tl.int32, bitcast=True)
    return 135 - ((bits + 0x1FFFFF) >> 23)


@triton.jit
def _power(exponent):
    """2^exponent as float32, -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _offsets(rows, L, b_stride, h_stride, l_stride, H: tl.constexpr):
    """Where the heads of tokens begin, counted as they lie in (B, L, H)."""
    token = rows // H
    b, t, h = (token // L).to(tl.int64), (token % L).to(tl.int64), (rows % H).to(tl.int64)
    return b * b_stride + t * l_stride + h * h_stride


@triton.jit
def _centered(v, center, rows, columns, inside, H: tl.constexpr, D: tl.constexpr):
    """What is left of v, float32; zero where there is none."""
    x = tl.load(v, mask=inside, other=0.0).to(tl.float32)
    return x - tl.load(center + (rows % H)[:, None] * D + columns[None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _measure(
    v,  # (B, H, L, D) bf16 or fp16, D contiguous
    center,  # (H, D)
    most,  # (PARTS,) float32
    rows_in_all, rows_of_part, L, v_b, v_h, v_l,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    columns = tl.arange(0, BLOCK_D)
    largest = tl.zeros([ROWS], tl.float32)
    begin = part * rows_of_part
    for start in range(begin, tl.minimum(begin + rows_of_part, rows_in_all), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < rows_in_all)[:, None] & (columns < D)[None]
        at = _offsets(rows, L, v_b, v_h, v_l, H)[:, None] + columns[None]
        largest = tl.maximum(largest, tl.max(tl.abs(_centered(v + at, center, rows, columns, inside, H, D)), 1))
    tl.store(most + part, tl.max(largest, 0))


@triton.jit
def _norm_exponent(first, second, D: tl.constexpr, ROOT: tl.constexpr, BLOCK_D: tl.constexpr):
    """The exponent for vectors that were RMS-normed with either of two weights."""
    columns = tl.arange(0, BLOCK_D)
    x = tl.load(first + columns, mask=columns < D, other=0.0).to(tl.float32)
    y = tl.load(second + columns, mask=columns < D, other=0.0).to(tl.float32)
    return _largest_exponent(tl.max(tl.maximum(tl.abs(x), tl.abs(y)), 0) * ROOT)


@triton.jit
def _store_scalars(scalars, descale, exponent_q, exponent_k, exponent_v):
    """cuDNN's: q's and k's factor together, ones for v and o. o is in units of v, whose largest it stays below."""
    tl.store(descale, _power(-exponent_v))
    tl.store(scalars, _power(-(exponent_q + exponent_k)))
    tl.store(scalars + 4, 1.0)
    tl.store(scalars + 8, 1.0)
    tl.store(scalars + 12, 1.0 / _P_SCALE)
    tl.store(scalars + 16, _P_SCALE)
    tl.store(scalars + 20, 1.0)
    tl.store(scalars + 24, 0.0)
    tl.store(scalars + 28, 0.0)


@triton.jit
def _round(
    q, k, v,  # (B, H, L, D) bf16 or fp16, D contiguous
    center,  # (H, D)
    q_first, q_second, k_first, k_second,  # (D,) norm weights
    most,  # (PARTS,) float32
    q8, k8, v8,  # (B, L, H, D) e4m3
    scalars,  # (8, 4) float32
    descale,  # (1,) float32
    rows_in_all, L, q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    H: tl.constexpr, D: tl.constexpr, ROOT: tl.constexpr, BLOCK_D: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    exponent_q = _norm_exponent(q_first, q_second, D, ROOT, BLOCK_D)
    exponent_k = _norm_exponent(k_first, k_second, D, ROOT, BLOCK_D)
    exponent_v = _largest_exponent(tl.max(tl.load(most + tl.arange(0, PARTS)), 0))

    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < rows_in_all)[:, None] & (columns < D)[None]
    x = tl.load(q + _offsets(rows, L, q_b, q_h, q_l, H)[:, None] + columns[None], mask=inside, other=0.0)
    y = tl.load(k + _offsets(rows, L, k_b, k_h, k_l, H)[:, None] + columns[None], mask=inside, other=0.0)
    z = v + _offsets(rows, L, v_b, v_h, v_l, H)[:, None] + columns[None]
    to = rows.to(tl.int64)[:, None] * D + columns[None]
    tl.store(q8 + to, (x.to(tl.float32) * _power(exponent_q)).to(q8.dtype.element_ty), mask=inside)
    tl.store(k8 + to, (y.to(tl.float32) * _power(exponent_k)).to(k8.dtype.element_ty), mask=inside)
    rest = _centered(z, center, rows, columns, inside, H, D)
    tl.store(v8 + to, (rest * _power(exponent_v)).to(v8.dtype.element_ty), mask=inside)

    if tl.program_id(0) == 0:
        _store_scalars(scalars, descale, exponent_q, exponent_k, exponent_v)


def quantize(
    q: Tensor,  # (B, H, L, D) bf16 or fp16, any strides with D contiguous
    k: Tensor,  # (B, H, L, D)
    v: Tensor,  # (B, H, L, D)
    norm_q: Sequence[Tensor],  # one or two of (D,): the weights of the norms of parts of the tokens
    norm_k: Sequence[Tensor],
    dtype: torch.dtype = torch.float8_e4m3fn,  # of the results; float32 shows them before they are rounded
) -> QuantizedHeads:
    """Round q, k and v."""
    batch, heads, length, size = q.shape
    rows = batch * heads * length
    block_d = triton.next_power_of_2(size)
    middle = center(v)
    most = torch.empty(PARTS, dtype=torch.float32, device=q.device)
    rounded = torch.empty((3, batch, length, heads, size), dtype=dtype, device=q.device)
    scalars = torch.empty((len(SCALARS), 4), dtype=torch.float32, device=q.device)
    descale = torch.empty(1, dtype=torch.float32, device=q.device)
    rows_of_part = triton.cdiv(triton.cdiv(rows, PARTS), MEASURED_ROWS) * MEASURED_ROWS
    _measure[PARTS,](
        v, middle, most, rows, rows_of_part, length, *v.stride()[:3],
        H=heads, D=size, BLOCK_D=block_d, ROWS=MEASURED_ROWS, num_warps=4,
    )  # fmt: skip
    _round[triton.cdiv(rows, ROUNDED_ROWS),](
        q, k, v, middle, norm_q[0], norm_q[-1], norm_k[0], norm_k[-1], most, *rounded.unbind(), scalars, descale,
        rows, length, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        H=heads, D=size, ROOT=size**0.5, BLOCK_D=block_d, PARTS=PARTS, ROWS=ROUNDED_ROWS, num_warps=4,
    )  # fmt: skip
    q8, k8, v8 = rounded.transpose(2, 3).unbind()
    return QuantizedHeads(q8, k8, v8, middle, scalars, descale)
