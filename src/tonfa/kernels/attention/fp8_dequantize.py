"""The result of FP8 attention to 16 bits: one power of two for all, exact in bfloat16. Bound by memory."""

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
    out,  # (count,)
    count, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(o + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, (x * tl.load(descale)).to(out.dtype.element_ty), mask=at < count)


def dequantize(
    o: Tensor,  # (B, L, H, D) e4m3, contiguous
    descale: Tensor,  # (1,) float32
    dtype: torch.dtype,  # bfloat16 or float16
) -> Tensor:
    """(B, L, H * D)."""
    out = torch.empty((*o.shape[:2], o.shape[2] * o.shape[3]), dtype=dtype, device=o.device)
    _dequantize[triton.cdiv(o.numel(), BLOCK),](o, descale, out, o.numel(), BLOCK=BLOCK, num_warps=4)
    return out
