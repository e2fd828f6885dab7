"""The scales of q, k and v for attention_fp8 before any of them is computed: one program, about 2 us.

|v| is bounded by the norms of the rows of the projection's input (Cauchy-Schwarz). The bound is ten to a hundred times
the largest |v|, which e4m3 with its fifteen binades does not feel: on the demo model v's scale may be wrong by 2^10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tonfa.kernels.attention.fp8_quantize import largest_exponent, norm_exponent, power, store_scalars
from tonfa.ops.attention_fp8 import SCALARS

BLOCK = 8192
"""Norms that are read at a time: all of 1024 x 1024 pixels."""


@dataclass(frozen=True)
class Source:
    """What bounds the q, k and v of some tokens."""

    norms: Tensor  # (at least rows,) float32: bounds of the l2 norms of the input's rows
    rows: int
    bound: Tensor  # (2,) float32: |v| is at most the norm * [0] + [1]
    norm_q: Tensor  # (D,)
    norm_k: Tensor  # (D,)


@dataclass(frozen=True)
class Scales:
    """What q, k and v are multiplied with, and the same for cuDNN."""

    factors: Tensor  # (3,) float32: powers of two
    scalars: Tensor  # (8, 4) float32, as in QuantizedHeads
    descale: Tensor  # (1,) float32


@triton.jit
def _largest_value(norms, rows, bound, BLOCK: tl.constexpr):
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(norms + at, mask=at < rows, other=0.0))
    return tl.max(largest, 0) * tl.load(bound) + tl.load(bound + 1)


@triton.jit
def _attention_scales(
    first_norms, second_norms,  # (rows,) float32
    first_rows, second_rows,
    first_bound, second_bound,  # (2,) float32
    q_first, q_second, k_first, k_second,  # (D,) norm weights
    factors,  # (3,) float32
    scalars,  # (8, 4) float32
    descale,  # (1,) float32
    D: tl.constexpr, ROOT: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    exponent_q = norm_exponent(q_first, q_second, D, ROOT, BLOCK_D)
    exponent_k = norm_exponent(k_first, k_second, D, ROOT, BLOCK_D)
    first = _largest_value(first_norms, first_rows, first_bound, BLOCK)
    exponent_v = largest_exponent(tl.maximum(first, _largest_value(second_norms, second_rows, second_bound, BLOCK)))
    tl.store(factors, power(exponent_q))
    tl.store(factors + 1, power(exponent_k))
    tl.store(factors + 2, power(exponent_v))
    store_scalars(scalars, descale, exponent_q, exponent_k, exponent_v)


def scales(
    sources: Sequence[Source],  # one or two
) -> Scales:
    """Powers of two with which nothing saturates."""
    first, second = sources[0], sources[-1]
    device, size = first.norms.device, first.norm_q.numel()
    found = Scales(
        torch.empty(3, dtype=torch.float32, device=device),
        torch.empty((len(SCALARS), 4), dtype=torch.float32, device=device),
        torch.empty(1, dtype=torch.float32, device=device),
    )
    _attention_scales[1,](
        first.norms, second.norms, first.rows, 0 if len(sources) == 1 else second.rows, first.bound, second.bound,
        first.norm_q, second.norm_q, first.norm_k, second.norm_k, found.factors, found.scalars, found.descale,
        D=size, ROOT=size**0.5, BLOCK_D=triton.next_power_of_2(size), BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip
    return found
