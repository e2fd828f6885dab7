"""attention_fp8: softmax(q k^T / sqrt(D)) v with q, k, v, the probabilities and the result rounded to e4m3.

Two things keep it close to 16 bits. The mean of k over the tokens is subtracted: it adds the same number to all scores
of a row, which softmax does not see, while e4m3 would spend its three bits of mantissa on it (SageAttention, arXiv
2410.02367). And every head has scales of its own. They are powers of two, so that scaling itself rounds nothing, and
come from cheap upper bounds: e4m3 keeps its relative precision over fifteen binades, one more or less loses nothing.

cuDNN, which computes this on Hopper, takes one scale for each of q, k and v. The product of q's and k's scales is
therefore the same for all heads, and v's is folded into the reading of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

P_SCALE = 64.0
"""What the probabilities exp(s - max) are multiplied with: normal from 2^-12, and never above e4m3's 448, even where a
kernel lets the maximum that it subtracts lag behind by two binades, as cuDNN may."""

SMALLEST_BOUND, LARGEST_BOUND = 2.0**-30, 2.0**60
"""Bounds are kept between them, which keeps powers of two and their products normal numbers in float32."""


@dataclass(frozen=True)
class Exponents:
    """Powers of two, (B, H) int32 each: x is rounded as x * 2^exponent. q + k is the same for all heads."""

    q: Tensor
    k: Tensor
    v: Tensor


def largest_exponents(
    bound: Tensor,  # (...) not negative
) -> Tensor:
    """The largest n with bound * 2^n <= 448, int32."""
    mantissa, exponent = torch.frexp(bound.float().clamp(SMALLEST_BOUND, LARGEST_BOUND))
    return torch.where(mantissa <= 0.875, 9, 8).int() - exponent


def exponents(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, H, L, D)
    v: Tensor,  # (B, H, L, D)
) -> Exponents:
    """Scales from the absolute maxima; smoothing at most doubles k's."""
    most_q = largest_exponents(q.abs().amax((2, 3)))
    most_k = largest_exponents(2 * k.float().abs().amax((2, 3)))
    spare = most_q + most_k - (most_q + most_k).min()
    return Exponents(most_q - spare // 2, most_k - (spare - spare // 2), largest_exponents(v.abs().amax((2, 3))))


def smooth(
    k: Tensor,  # (B, H, L, D)
) -> Tensor:
    """K minus its mean over the tokens, float32 (or k's own dtype if that is wider)."""
    wide = k if k.dtype == torch.float64 else k.float()
    return wide - wide.mean(2, keepdim=True)


def quantize(
    x: Tensor,  # (B, H, L, D)
    exponent: Tensor,  # (B, H)
) -> Tensor:
    """e4m3(x * 2^exponent), half to even."""
    return torch.ldexp(x.float(), exponent[..., None, None]).to(torch.float8_e4m3fn)


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
    scores = torch.ldexp(scores, -(scales.q + scales.k)[..., None, None]) * q.shape[-1] ** -0.5
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    rounded = (p * P_SCALE).to(torch.float8_e4m3fn).to(dtype)
    out = rounded @ v.to(dtype) / (P_SCALE * p.sum(-1, keepdim=True))
    return out.to(torch.float8_e4m3fn).transpose(1, 2)


def dequantize(
    o: Tensor,  # (B, L, H, D) e4m3
    exponent: Tensor,  # (B, H)
    dtype: torch.dtype,
) -> Tensor:
    """(B, L, H * D) of `dtype`: exact in bfloat16, whose exponents reach further."""
    return torch.ldexp(o.float(), -exponent[:, None, :, None]).to(dtype).flatten(2)


def reference(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, H, L, D)
    v: Tensor,  # (B, H, L, D)
    dtype: torch.dtype = torch.float32,  # of sums and softmax
) -> Tensor:
    """The specification: (B, L, H * D) of q's dtype."""
    scales = exponents(q, k, v)
    rounded = quantize(q, scales.q), quantize(smooth(k), scales.k), quantize(v, scales.v)
    return dequantize(attend(*rounded, scales, dtype), scales.v, q.dtype)
