"""w4a16: a linear with asymmetric 4-bit weights and 16-bit activations, for FLUX's modulations (a row per image).

y = x (codes * wscales + wzeros)^T + bias

w4a16_group is the same for several linears that read one x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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


def group(
    w4a16: Callable[[Tensor, Any], Tensor],
    x: Tensor,  # (B, K) 16-bit
    weights: Sequence[Any],
) -> tuple[Tensor, ...]:
    """w4a16_group, one after the other: (B, N) for each of the linears."""
    return tuple(w4a16(x, w) for w in weights)
