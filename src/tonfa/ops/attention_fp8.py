"""attention_fp8: softmax(q k^T / sqrt(D)) (v - c) + c with q, k, v - c, the probabilities and the product rounded to
e4m3.

c, the center, is what the tokens' v have in common. It changes nothing but rounding, since every row of the softmax
sums to one. It must not be left in: Hopper's tensor cores add e4m3 products with 14 bits and cut off the rest, which
sums over thousands of tokens of one sign do not survive (found of FP8 products in DeepSeek-V3, arXiv 2412.19437, and of
attention in SageAttention2, arXiv 2411.10958, which centers v as well). With v of mean 2 and deviation 1 cuDNN loses
7 % of the result at 4608 tokens and 15 % at 9216. The mean of a few tokens is as good a center as that of all.

q and k have been RMS-normed with weights w and rotated in pairs of channels, as in FLUX. An RMS-normed vector has the
length sqrt(D) before the weights, so no element exceeds sqrt(D) max|w|: their scales are known before anything is
computed. v's comes from its absolute maximum. Scales are powers of two and round nothing themselves. That the bound of
q and k is about ten times a typical element costs nothing, since e4m3 keeps its relative precision over fifteen
binades. For the same reason one scale for all heads, which is what cuDNN takes, is as good as one for each.

On the demo model FP8 attention moves the predicted velocity by 2 %, rounding the weights to 4 bits by 5 %. Scales from
the maxima of each head, or subtracting from k its mean over the tokens (SageAttention, arXiv 2410.02367, needs that for
integers, whose steps are uniform), are no better there, so both are left out (`benchmarks/attention_fp8.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

P_SCALE = 64.0
"""What the probabilities exp(s - max) are multiplied with: normal from 2^-12, and never above e4m3's 448, even where a
kernel lets the maximum that it subtracts lag behind by two binades, as cuDNN may."""

SMALLEST_BOUND, LARGEST_BOUND = 2.0**-30, 2.0**60
"""Bounds are kept between them, which keeps powers of two and their products normal numbers in float32."""

SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o", "amax_s", "amax_o")
"""Rows of `QuantizedHeads.scalars`, each padded to the 16 bytes that cuDNN aligns tensors to."""


@dataclass(frozen=True)
class QuantizedHeads:
    """What FP8 attention reads, and what its result is in."""

    q: Tensor  # (B, H, L, D) e4m3, in memory (B, L, H, D), as k and v
    k: Tensor
    v: Tensor
    center: Tensor  # (H * D,) of the 16-bit dtype: what v is less, and the result, too
    scalars: Tensor  # (8, 4) float32: SCALARS in the first column
    descale: Tensor  # (1,) float32: what v and the result are to be multiplied with


@dataclass(frozen=True)
class Exponents:
    """Powers of two, int32 scalars: x is rounded as x * 2^exponent."""

    q: Tensor
    k: Tensor
    v: Tensor


def largest_exponents(
    bound: Tensor,  # (...) not negative
) -> Tensor:
    """The largest n with bound * 2^n <= 448, int32."""
    mantissa, exponent = torch.frexp(bound.float().clamp(SMALLEST_BOUND, LARGEST_BOUND))
    return torch.where(mantissa <= 0.875, 9, 8).int() - exponent


def norm_bound(
    weights: Sequence[Tensor],  # (D,) each
) -> Tensor:
    """The largest element that an RMS-normed and rotated vector can have, float32."""
    largest = torch.stack([w.float().abs().amax() for w in weights]).amax()
    return torch.mul(largest, weights[0].numel() ** 0.5)


def center(
    v: Tensor,  # (B, H, L, D)
) -> Tensor:
    """(H * D,) of v's dtype: the mean of all tokens. A kernel may take another: what is taken is added again."""
    return v.mean((0, 2), dtype=torch.float32).flatten().to(v.dtype)


def centered(
    v: Tensor,  # (B, H, L, D)
    center: Tensor,  # (H * D,)
) -> Tensor:
    """v - center in float32."""
    return v.float() - center.float().view(v.shape[1], 1, v.shape[3])


def exponents(
    v: Tensor,  # (B, H, L, D), centered
    norm_q: Sequence[Tensor],  # (D,) each: the weights of the norms of parts of the tokens
    norm_k: Sequence[Tensor],
) -> Exponents:
    """Scales with which nothing saturates."""
    most = v.abs().amax()
    return Exponents(*map(largest_exponents, (norm_bound(norm_q), norm_bound(norm_k), most)))


def quantize(
    x: Tensor,  # (B, H, L, D)
    exponent: Tensor,
) -> Tensor:
    """e4m3(x * 2^exponent), half to even."""
    return torch.ldexp(x.float(), exponent).to(torch.float8_e4m3fn)


def round_heads(
    q: Tensor,  # (B, H, L, D) float32 or 16-bit, as k and v
    k: Tensor,
    v: Tensor,
    center: Tensor,  # (H * D,) of the 16-bit dtype
    scales: Exponents,  # v's from the maximum of what is left of it, or from any bound of that which is known earlier
) -> QuantizedHeads:
    """What a kernel that rounds q, k and v hands to the attention.

    A product that rounds its heads itself does not round q and k to 16 bits before. It bounds |v| by the norms of its
    input's rows (Cauchy-Schwarz), which are known before v is. On the demo model FP8 attention with factors of 2^-4
    to 2^6 for v moves the velocity by 2.06 to 2.10 %, with that of v's maximum by 2.04 %.
    """
    one = torch.ones(1, device=q.device)
    scalars = torch.ones(len(SCALARS), 4, device=q.device)
    scalars[0] = torch.ldexp(one, -(scales.q + scales.k))
    scalars[3], scalars[4], scalars[6:] = 1 / P_SCALE, P_SCALE, 0
    descale = torch.ldexp(one, -scales.v)
    rounded = quantize(q, scales.q), quantize(k, scales.k), quantize(centered(v, center), scales.v)
    return QuantizedHeads(*rounded, center, scalars, descale)


def attend(
    q: Tensor,  # (B, H, L, D) e4m3
    k: Tensor,  # (B, H, L, D) e4m3
    v: Tensor,  # (B, H, L, D) e4m3
    scales: Exponents,
    dtype: torch.dtype = torch.float32,  # of sums and softmax
) -> Tensor:
    """The result as cuDNN writes it: (B, L, H, D) e4m3 in units of 2^-scales.v.

    Probabilities are rounded relative to the largest of their row; a kernel that goes over the keys block by block
    rounds them relative to the largest so far, so single bytes may differ.
    """
    scores = q.to(dtype) @ k.to(dtype).transpose(2, 3)
    scores = torch.ldexp(scores, -(scales.q + scales.k)) * q.shape[-1] ** -0.5
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    rounded = (p * P_SCALE).to(torch.float8_e4m3fn).to(dtype)
    out = rounded @ v.to(dtype) / (P_SCALE * p.sum(-1, keepdim=True))
    return out.to(torch.float8_e4m3fn).transpose(1, 2)


def dequantize(
    o: Tensor,  # (B, L, H, D) e4m3
    exponent: Tensor,
    center: Tensor,  # (H * D,)
    dtype: torch.dtype,
) -> Tensor:
    """(B, L, H * D) of `dtype`, rounded once."""
    return (torch.ldexp(o.float(), -exponent).flatten(2) + center.float()).to(dtype)


def reference(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, H, L, D)
    v: Tensor,  # (B, H, L, D)
    norm_q: Sequence[Tensor],  # (D,) each
    norm_k: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,  # of sums and softmax
) -> Tensor:
    """The specification: (B, L, H * D) of q's dtype."""
    middle = center(v)
    scales = exponents(centered(v, middle), norm_q, norm_k)
    heads = round_heads(q, k, v, middle, scales)
    return dequantize(attend(heads.q, heads.k, heads.v, scales, dtype), scales.v, middle, q.dtype)
