"""Widening 4-bit weights to INT8 with one scale for each output channel, just before each integer product.

The 4-bit weights stay as the checkpoint holds them; only the row scales are computed when a layer is bound. A weight
becomes rint(code * wscale * (1 / row scale)), bit for bit as `ops.product.widen` defines it. 3072 x 3072 weights take
0.5 ms on two Zen 4 cores (1.0 ms on one), 4 % of the product of 512 rows that follows.

`torch._int_mm` adds pairs of products in 16 bits on x86 CPUs without VNNI, and saturates there without a word. Whether
it is exact at full range is therefore tried out, once; if not, weights are widened to [-63, 63], which leaves pairs of
an offset activation (0..255) below 2^15.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from tonfa.formats import GROUP_SIZE
from tonfa.kernels.cpu.scalar import (
    claim,
    element_type,
    from_bits,
    magnitude,
    pointer,
    reciprocal_or_zero,
    rint,
    to_float,
)
from tonfa.kernels.cpu.team import WORDS, compile_kernel, launch

_HALF_GROUP = GROUP_SIZE // 2


@lru_cache(maxsize=1)
def exact_levels() -> int:
    """127 if `torch._int_mm` is exact on this CPU at the ends of the 8-bit range, else 63."""
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 64):
        a = torch.full((rows, 256), 127, dtype=torch.int8)
        b = torch.randint(0, 2, (256, 64), dtype=torch.int8, generator=generator) * 2 - 1
        b[:, :32] = 1
        a[1::2] *= -1
        b *= 127
        if not torch.equal(torch._int_mm(a, b), a.int() @ b.int()):
            return 63
    return 127


@lru_cache(maxsize=8)
def _row_scale_kernel(dtype: torch.dtype) -> Any:
    """Largest |code * wscale| of each row. Words: qweight, wscales, maxima, K/G."""
    element = element_type(dtype)

    def row_maxima(words: Any) -> None:
        a = carray(words, (WORDS,))
        rows, chunk, groups = a[1], a[2], a[6]
        qweight = carray(pointer(a[3]), (rows, groups, _HALF_GROUP), np.int8)
        wscales = carray(pointer(a[4]), (groups, rows), element)
        maxima = carray(pointer(a[5]), (rows,), np.float32)
        start = claim(words, chunk)
        while start < rows:
            for n in range(start, min(start + chunk, rows)):
                top = np.uint32(0)
                for g in range(groups):
                    largest = np.int8(0)
                    for j in range(_HALF_GROUP):
                        pair = qweight[n, g, j]
                        low, high = np.int8(np.int8(pair << 4) >> 4), np.int8(pair >> 4)
                        largest = max(largest, np.int8(abs(low)), np.int8(abs(high)))
                    top = max(top, magnitude(np.float32(largest) * to_float(wscales[g, n])))
                maxima[n] = from_bits(top)
            start = claim(words, chunk)

    return compile_kernel(row_maxima)


def row_scales(
    qweight: Tensor,  # (N, K/2) uint8
    wscales: Tensor,  # (K/G, N)
    levels: int,
) -> Tensor:
    """(N,) float32: the scales of `ops.product.widen`."""
    (groups, n), channels = wscales.shape, 2 * qweight.shape[1]
    maxima = torch.empty(n)
    launch(_row_scale_kernel(wscales.dtype), n, channels, qweight, wscales, maxima, groups)
    return maxima * (1.0 / levels)


@lru_cache(maxsize=8)
def kernel(dtype: torch.dtype) -> Any:
    """Widen rows n0, n0 + 1, ... Words: qweight, wscales, row scales, out (all of row 0), K/G, n0, N."""
    element = element_type(dtype)

    def widen_rows(words: Any) -> None:
        a = carray(words, (WORDS,))
        rows, chunk, groups, n0, all_rows = a[1], a[2], a[7], a[8], a[9]
        qweight = carray(pointer(a[3]), (all_rows, groups, _HALF_GROUP), np.int8)
        wscales = carray(pointer(a[4]), (groups, all_rows), element)
        scales = carray(pointer(a[5]), (all_rows,), np.float32)
        out = carray(pointer(a[6]), (rows, groups, _HALF_GROUP, 2), np.int8)
        start = claim(words, chunk)
        while start < rows:
            for i in range(start, min(start + chunk, rows)):
                n = n0 + i
                reciprocal = reciprocal_or_zero(scales[n])
                for g in range(groups):
                    scale = to_float(wscales[g, n])
                    for j in range(_HALF_GROUP):
                        pair = qweight[n, g, j]
                        low, high = np.int8(pair << 4) >> 4, pair >> 4
                        out[i, g, j, 0] = np.int8(rint(np.float32(low) * scale * reciprocal))
                        out[i, g, j, 1] = np.int8(rint(np.float32(high) * scale * reciprocal))
            start = claim(words, chunk)

    return compile_kernel(widen_rows)


def widen(
    qweight: Tensor,  # (N, K/2) uint8
    wscales: Tensor,  # (K/G, N)
    scales: Tensor,  # (N,) float32
    n0: int,
    out: Tensor,  # (rows, K) int8, receives rows n0 to n0 + rows
) -> None:
    """Write a tile of the widened weights."""
    rows, channels = out.shape
    groups = channels // GROUP_SIZE
    launch(kernel(wscales.dtype), rows, channels, qweight, wscales, scales, out, groups, n0, qweight.shape[0])
