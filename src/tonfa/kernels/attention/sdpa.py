"""Attention in 16 bits: on sm_90 and sm_100 by cuDNN, which is 1.9 times as fast as torch's own choice on an H200
(427 us against 799 for 24 heads of 4608 tokens), elsewhere and for what cuDNN refuses by torch's
scaled_dot_product_attention.

The op behind torch's cuDNN backend is called itself: no context manager, nothing to choose in a call, and it can be
recorded in a CUDA graph and compiled. Masked attention is left to torch, which knows which of its backends
takes which mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_HEAD = 128
"""Of cuDNN's forward pass on every GPU; torch takes larger heads on some GPUs with some versions alone."""
CAPABILITIES = ((9, 0), (10, 0))
"""With tensor cores that torch's own choice, FlashAttention 2, was not written for."""

_runs: dict[torch.device, bool] = {}


def _cudnn_runs(device: torch.device) -> bool:
    """Whether cuDNN is the faster one on this device and torch has it, switched on; asked once for each."""
    if device not in _runs:
        _runs[device] = _ask(device)
    return _runs[device]


# As torch.compiler.assume_constant_result does, which would import the compiler here and now.
_cudnn_runs.__dict__["_dynamo_marked_constant"] = True


def _ask(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    if torch.cuda.get_device_capability(device) not in CAPABILITIES:
        return False
    q, k, v = (torch.empty((1, 1, 64, 64), dtype=torch.bfloat16, device=device) for _ in range(3))
    with torch.cuda.device(device):
        parameters = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        return torch.backends.cuda.can_use_cudnn_attention(parameters)


def _takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether cuDNN's backend takes these, by the checks of torch's own choice."""
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.dtype == k.dtype == v.dtype
        and q.shape[-1] <= LARGEST_HEAD
        and q.shape[-1] % 8 == 0
        and k.shape[2] > 1
        and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad))
        and _cudnn_runs(q.device)
    )


def attention(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, H, L, D)
    v: Tensor,  # (B, H, L, D)
    mask: Tensor | None = None,  # broadcast to (B, H, L, L): bool (True attends) or added to the scores
) -> Tensor:
    """(B, L, H * D) of q's dtype. cuDNN lays its result out as q is: no copy where q is a view of (B, L, H, D)."""
    if mask is None and _takes(q, k, v):
        out: Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0]
    else:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)
