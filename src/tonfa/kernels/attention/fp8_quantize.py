"""q, k and v to e4m3 for attention_fp8: smoothing of k and a power of two for every head (see ops/attention_fp8.py).

Two passes, bound by memory. The first reads everything once and leaves for each of at most CHUNKS pieces of a head the
sums of k's columns and the largest |q|, |k|, |v|; the second adds the pieces up, every program again for its own head,
and rounds. It walks backwards, so that what the first read last is still in the L2 cache: of 85 MB (24 heads of 4608
tokens) an H200 keeps up to 60. Nothing is added atomically: results do not depend on the order of the programs.

Every exponent is an integer taken from the bits of a float32, so q and v agree with the reference byte for byte; k's
mean is a sum in another order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tonfa.ops.attention_fp8 import LARGEST_BOUND, P_SCALE, SMALLEST_BOUND

CHUNKS = 16
ROWS = 64
"""Tokens that a program reads at a time."""
ROUNDED_ROWS = 64
"""Tokens that a program of the second pass rounds: with 128 it needs 142 registers, and one program fills an SM."""
SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o", "amax_s", "amax_o")
"""Rows of `QuantizedHeads.scalars`, each padded to the 16 bytes that cuDNN aligns tensors to."""

_SMALLEST = tl.constexpr(SMALLEST_BOUND)
_LARGEST = tl.constexpr(LARGEST_BOUND)
_P_SCALE = tl.constexpr(P_SCALE)


@dataclass(frozen=True)
class QuantizedHeads:
    """What cuDNN reads, and what its result is in."""

    q: Tensor  # (B, H, L, D) e4m3, contiguous, as k and v
    k: Tensor
    v: Tensor
    scalars: Tensor  # (8, 4) float32: SCALARS in the first column
    descale: Tensor  # (B * H,) float32: what the result is to be multiplied with


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
def _pieces(
    q, k, v,  # (B, H, L, D) bf16 or fp16, D contiguous
    sums,  # (B * H, chunks, D) float32
    most,  # (3, B * H, chunks) float32: |q|, |k|, |v|
    L, rows_of_chunk,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    chunk, head = tl.program_id(0), tl.program_id(1)
    chunks, heads = tl.num_programs(0), tl.num_programs(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    most_q = tl.zeros([ROWS], tl.float32)
    most_k = tl.zeros([ROWS], tl.float32)
    most_v = tl.zeros([ROWS], tl.float32)
    begin = chunk * rows_of_chunk
    for start in range(begin, tl.minimum(begin + rows_of_chunk, L), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < L)[:, None] & (columns < D)[None]
        at = rows.to(tl.int64)[:, None]
        x = tl.load(q + b * q_b + h * q_h + at * q_l + columns[None], mask=inside, other=0.0).to(tl.float32)
        y = tl.load(k + b * k_b + h * k_h + at * k_l + columns[None], mask=inside, other=0.0).to(tl.float32)
        z = tl.load(v + b * v_b + h * v_h + at * v_l + columns[None], mask=inside, other=0.0).to(tl.float32)
        most_q = tl.maximum(most_q, tl.max(tl.abs(x), 1))
        most_k = tl.maximum(most_k, tl.max(tl.abs(y), 1))
        most_v = tl.maximum(most_v, tl.max(tl.abs(z), 1))
        total += tl.sum(y, 0)
    piece = head * chunks + chunk
    tl.store(sums + piece * D + columns, total, mask=columns < D)
    tl.store(most + piece, tl.max(most_q, 0))
    tl.store(most + heads * chunks + piece, tl.max(most_k, 0))
    tl.store(most + 2 * heads * chunks + piece, tl.max(most_v, 0))


@triton.jit
def _round(
    q, k, v,  # (B, H, L, D) bf16 or fp16, D contiguous
    sums,  # (B * H, chunks, D) float32
    most,  # (3, B * H, chunks) float32
    q8, k8, v8,  # (B, H, L, D) e4m3, contiguous
    scalars,  # (8, 4) float32
    descale,  # (B * H,) float32
    L, chunks, heads,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = heads - 1 - tl.program_id(1)
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    columns, pieces = tl.arange(0, BLOCK_D), tl.arange(0, CHUNKS)

    all_heads = tl.arange(0, HEADS)
    each = all_heads[:, None] * chunks + pieces[None]
    known = (all_heads < heads)[:, None] & (pieces < chunks)[None]
    bound_q = tl.max(tl.load(most + each, mask=known, other=0.0), 1)
    bound_k = tl.max(tl.load(most + heads * chunks + each, mask=known, other=0.0), 1) * 2.0
    both = _largest_exponent(bound_q) + _largest_exponent(bound_k)
    common = tl.min(tl.where(all_heads < heads, both, 1024), 0)

    own = head * chunks + pieces
    some = pieces < chunks
    most_q = _largest_exponent(tl.max(tl.load(most + own, mask=some, other=0.0), 0))
    most_k = _largest_exponent(tl.max(tl.load(most + heads * chunks + own, mask=some, other=0.0), 0) * 2.0)
    exponent_v = _largest_exponent(tl.max(tl.load(most + 2 * heads * chunks + own, mask=some, other=0.0), 0))
    exponent_q = most_q - (most_q + most_k - common) // 2
    scale_q, scale_k, scale_v = _power(exponent_q), _power(common - exponent_q), _power(exponent_v)

    inside = some[:, None] & (columns < D)[None]
    mean = tl.sum(tl.load(sums + own[:, None] * D + columns[None], mask=inside, other=0.0), 0) / L

    rows = block * ROWS + tl.arange(0, ROWS)
    inside = (rows < L)[:, None] & (columns < D)[None]
    at = rows.to(tl.int64)[:, None]
    x = tl.load(q + b * q_b + h * q_h + at * q_l + columns[None], mask=inside, other=0.0).to(tl.float32)
    y = tl.load(k + b * k_b + h * k_h + at * k_l + columns[None], mask=inside, other=0.0).to(tl.float32)
    z = tl.load(v + b * v_b + h * v_h + at * v_l + columns[None], mask=inside, other=0.0).to(tl.float32)
    to = (head.to(tl.int64) * L + at) * D + columns[None]
    tl.store(q8 + to, (x * scale_q).to(q8.dtype.element_ty), mask=inside)
    tl.store(k8 + to, ((y - mean[None]) * scale_k).to(k8.dtype.element_ty), mask=inside)
    tl.store(v8 + to, (z * scale_v).to(v8.dtype.element_ty), mask=inside)

    if block == 0:
        tl.store(descale + head, _power(-exponent_v))
        if head == 0:
            tl.store(scalars, _power(-common))
            tl.store(scalars + 4, 1.0)
            tl.store(scalars + 8, 1.0)
            tl.store(scalars + 12, 1.0 / _P_SCALE)
            tl.store(scalars + 16, _P_SCALE)
            tl.store(scalars + 20, 1.0)
            tl.store(scalars + 24, 0.0)
            tl.store(scalars + 28, 0.0)


def quantize(
    q: Tensor,  # (B, H, L, D) bf16 or fp16, any strides with D contiguous
    k: Tensor,  # (B, H, L, D)
    v: Tensor,  # (B, H, L, D)
    dtype: torch.dtype = torch.float8_e4m3fn,  # of the results; float32 shows them before they are rounded
) -> QuantizedHeads:
    """Round q, k minus its mean over the tokens, and v."""
    batch, count, length, size = q.shape
    heads = batch * count
    block_d = triton.next_power_of_2(size)
    rows_of_chunk = triton.cdiv(triton.cdiv(length, CHUNKS), ROWS) * ROWS
    chunks = triton.cdiv(length, rows_of_chunk)
    sums = torch.empty((heads, chunks, size), dtype=torch.float32, device=q.device)
    most = torch.empty((3, heads, chunks), dtype=torch.float32, device=q.device)
    q8, k8, v8 = (torch.empty((batch, count, length, size), dtype=dtype, device=q.device) for _ in range(3))
    scalars = torch.empty((len(SCALARS), 4), dtype=torch.float32, device=q.device)
    descale = torch.empty(heads, dtype=torch.float32, device=q.device)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    _pieces[chunks, heads](
        q, k, v, sums, most, length, rows_of_chunk, *strides,
        H=count, D=size, BLOCK_D=block_d, ROWS=ROWS, num_warps=8,
    )  # fmt: skip
    _round[triton.cdiv(length, ROUNDED_ROWS), heads](
        q, k, v, sums, most, q8, k8, v8, scalars, descale, length, chunks, heads, *strides,
        H=count, D=size, BLOCK_D=block_d, HEADS=triton.next_power_of_2(heads), CHUNKS=CHUNKS, ROWS=ROUNDED_ROWS,
        num_warps=8,
    )  # fmt: skip
    return QuantizedHeads(q8, k8, v8, scalars, descale)
