"""The branch that makes the output's error least, with the 4-bit part as it is.

min over L of rank R of E || (W - Q - L) x ||^2 is solved by the leading singular triplets of (W - Q) V, with
E[x x^T] = V V^T, times V^-1 (as in QERA, arXiv 2410.06040). As the first step, before there is a Q, it is worse than
the plain decomposition, which takes the outliers out of what is quantized.
"""

from __future__ import annotations

from torch import Tensor

from tonfa.quantizer.hessian import Hessian
from tonfa.quantizer.lowrank import Factors, low_rank


def whitened_low_rank(matrix: Tensor, hessian: Hessian, rank: int, *, start: Tensor | None, seed: int) -> Factors:
    """The best approximation (N, K) of rank R under the Hessian; `subspace` is one of the whitened matrix."""
    factors = low_rank(hessian.whiten(matrix), rank, start=start, seed=seed)
    return Factors(hessian.unwhiten(factors.down), factors.up, factors.subspace)
