"""attention: softmax(q k^T / sqrt(D)) v over all heads, through torch's scaled_dot_product_attention."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def reference(
    q: Tensor,  # (B, H, L, D)
    k: Tensor,  # (B, H, L, D)
    v: Tensor,  # (B, H, L, D)
    mask: Tensor | None = None,  # broadcast to (B, H, L, L): bool (True attends) or added to the scores
    dtype: torch.dtype | None = None,  # of all arithmetic; None takes q's
) -> Tensor:
    """The specification: (B, L, H * D) of q's dtype."""
    arithmetic = dtype or q.dtype
    out = functional.scaled_dot_product_attention(q.to(arithmetic), k.to(arithmetic), v.to(arithmetic), attn_mask=mask)
    return out.to(q.dtype).transpose(1, 2).flatten(2)
