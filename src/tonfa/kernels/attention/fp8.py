"""FP8 attention by cuDNN: of heads that a product has rounded, or of 16-bit ones, rounded here.

What it cannot take is computed in 16 bits, with the reason logged once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from tonfa.errors import UnsupportedError
from tonfa.kernels.attention import cudnn_fp8, sdpa
from tonfa.kernels.attention.fp8_dequantize import dequantize
from tonfa.kernels.attention.fp8_quantize import quantize
from tonfa.ops.activation import ScaledFP8
from tonfa.ops.attention_fp8 import QuantizedHeads

log = logging.getLogger(__name__)

LARGEST_HEAD = 128
"""Hopper's kernel takes 256, Blackwell's does not."""

_said: set[str] = set()


def _say(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        log.warning("attention runs in 16 bits instead of FP8: %s", reason)


def _reason_against(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    size = q.shape[-1]
    if mask is not None:
        return "a mask was given, which cuDNN's FP8 attention does not take"
    if q.dtype not in (torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not all bfloat16 or all float16"
    if size % 16 or size > LARGEST_HEAD:
        return f"the head size {size} is not a multiple of 16 up to {LARGEST_HEAD}"
    if not q.shape == k.shape == v.shape:
        return f"q, k and v differ in shape: {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return "the channels of a head are not contiguous"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "gradients are wanted"
    return None


@torch.library.custom_op("tonfa::attention_fp8", mutates_args=())
def _compiled(q: Tensor, k: Tensor, v: Tensor, norm_q: Sequence[Tensor], norm_k: Sequence[Tensor]) -> Tensor:
    return _attention(q, k, v, norm_q, norm_k)


@_compiled.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, norm_q: Sequence[Tensor], norm_k: Sequence[Tensor]) -> Tensor:
    batch, heads, length, size = q.shape
    return q.new_empty((batch, length, heads * size))


def _attention(q: Tensor, k: Tensor, v: Tensor, norm_q: Sequence[Tensor], norm_k: Sequence[Tensor]) -> Tensor:
    with torch.cuda.device(q.device):
        x = quantize(q, k, v, norm_q, norm_k)
        try:
            out = cudnn_fp8.attend(x)
        except UnsupportedError as error:
            _say(str(error))
            return sdpa.attention(q, k, v)
        return dequantize(out, x.descale, x.center).flatten(2)


def attention(
    q: Tensor,  # (B, H, L, D) bf16 or fp16, RMS-normed and rotated
    k: Tensor,  # (B, H, L, D), likewise
    v: Tensor,  # (B, H, L, D)
    mask: Tensor | None,  # broadcast to (B, H, L, L): bool (True attends) or added to the scores
    norm_q: Sequence[Tensor],  # one or two of (D,): the weights of the norms of parts of the tokens
    norm_k: Sequence[Tensor],
) -> Tensor:
    """(B, L, H * D) of q's dtype: ops/attention_fp8.py, or 16-bit attention where cuDNN or this kernel refuses."""
    reason = _reason_against(q, k, v, mask)
    if torch.compiler.is_compiling():
        return sdpa.attention(q, k, v, mask) if reason else _compiled(q, k, v, norm_q, norm_k)
    if reason:
        _say(reason)
        return sdpa.attention(q, k, v, mask)
    return _attention(q, k, v, norm_q, norm_k)


def takes(shape: torch.Size, device: torch.device) -> bool:
    """Whether `attend` computes heads of this shape (B, H, L, D); if not, the reason is logged."""
    if torch.compiler.is_compiling():
        return False
    try:
        cudnn_fp8.check(shape, device)
    except UnsupportedError as error:
        _say(str(error))
        return False
    return True


def attend(
    x: QuantizedHeads,
    dtype: torch.dtype,  # that the result stands for
) -> ScaledFP8:
    """(B, L, H * D). v's scale is the result's: no mean of its rows exceeds its largest element."""
    return ScaledFP8(cudnn_fp8.attend(x).flatten(2), x.descale, x.center, dtype)
