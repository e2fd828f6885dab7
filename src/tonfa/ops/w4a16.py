"""w4a16: a linear with asymmetric 4-bit weights and 16-bit activations, for FLUX's modulations (a row per image).

y = x (codes * wscales + wzeros)^T + bias
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.weights import W4A16Weights


def reference(
    x: Tensor,  # (B, K) 16-bit
    w: W4A16Weights,
    dtype: torch.dtype = torch.float32,  # of all arithmetic
) -> Tensor:
    """The specification: (B, N) of x's dtype."""
    return functional.linear(x.to(dtype), *w.dense(dtype)).to(x.dtype)
