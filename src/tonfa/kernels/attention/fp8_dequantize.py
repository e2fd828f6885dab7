"""The result of FP8 attention to 16 bits: one power of two for all, and v's center again. Bound by memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Numbers of one program."""


@triton.jit
def _dequantize(
    o,  # (count,) e4m3
    descale,  # (1,) float32
    center,  # (channels,)
    out,  # (count,)
    count, channels, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(o + at, mask=at < count, other=0.0).to(tl.float32)
    c = tl.load(center + at % channels).to(tl.float32)
    tl.store(out + at, (x * tl.load(descale) + c).to(out.dtype.element_ty), mask=at < count)


def dequantize(
    o: Tensor,  # (B, L, H, D) e4m3, contiguous
    descale: Tensor,  # (1,) float32
    center: Tensor,  # (H * D,) bfloat16 or float16
) -> Tensor:
    """The numbers, in o's shape and the center's dtype."""
    out = torch.empty(o.shape, dtype=center.dtype, device=o.device)
    _dequantize[triton.cdiv(o.numel(), BLOCK),](
        o, descale, center, out, o.numel(), center.numel(), BLOCK=BLOCK, num_warps=4
    )
    return out
