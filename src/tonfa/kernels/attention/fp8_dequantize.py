"""The result of FP8 attention to 16 bits: a factor for each head, exact in bfloat16. Bound by memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Numbers of one program."""


@triton.jit
def _dequantize(
    o,  # (B, L, H, D) e4m3, contiguous
    descale,  # (B * H,) float32
    out,  # (B, L, H, D), contiguous
    sample,  # L * H * D
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1)
    begin = batch.to(tl.int64) * sample
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(o + begin + at, mask=at < sample, other=0.0).to(tl.float32)
    y = x * tl.load(descale + batch * H + (at // D) % H)
    tl.store(out + begin + at, y.to(out.dtype.element_ty), mask=at < sample)


def dequantize(
    o: Tensor,  # (B, L, H, D) e4m3, contiguous
    descale: Tensor,  # (B * H,) float32
    dtype: torch.dtype,  # bfloat16 or float16
) -> Tensor:
    """(B, L, H * D)."""
    batch, length, heads, size = o.shape
    out = torch.empty((batch, length, heads * size), dtype=dtype, device=o.device)
    sample = length * heads * size
    _dequantize[triton.cdiv(sample, BLOCK), batch](o, descale, out, sample, H=heads, D=size, BLOCK=BLOCK, num_warps=4)
    return out
