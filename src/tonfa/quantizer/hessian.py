"""The Hessian of a linear's output error, E[x x^T], factored once for all solvers that need it.

With H = V V^T, V upper triangular in an order of the channels: V whitens the error of a weight, ||E x|| = ||E V||; the
rows of U = V^-1 are the feedback of GPTQ (H^-1 = U^T U, the Cholesky factor that GPTQ asks for, arXiv 2210.17323); and
V_jj^2 is what is left of channel j's power when all channels that are quantized after it have made up for its error.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.quantizer.moments import InputMoments

DAMPING = 0.01
"""Of the mean diagonal, added to the diagonal: GPTQ's."""
RETRIES = 8


@dataclass(frozen=True)
class Hessian:
    """H (K, K), damped, in one order of its channels. All float32; V is found in float64, U from V in float32."""

    matrix: Tensor  # (K, K), channels in their own order
    order: Tensor  # (K,) int64: the channel that is quantized first, second, ...
    factor: Tensor  # (K, K) V, upper triangular, in `order`

    @cached_property
    def inverse(self) -> Tensor:
        """(K, K) U = V^-1, upper triangular, in `order`: three times the work of V, and not every solver needs it."""
        identity = torch.eye(len(self.order), device=self.factor.device)
        inverse: Tensor = torch.linalg.solve_triangular(self.factor, identity, upper=True)
        return inverse

    def whiten(self, error: Tensor) -> Tensor:
        """(N, K) -> (N, K) whose squares sum to the squared output error."""
        return error[:, self.order] @ self.factor

    def unwhiten(self, down: Tensor) -> Tensor:
        """(K, R) of a whitened matrix up @ down^T -> (K, R) of the matrix itself."""
        found = torch.empty_like(down)
        found[self.order] = self.inverse.T @ down
        return found

    def error(self, error: Tensor) -> float:
        """Mean over tokens of the squared output error of a weight error (N, K), the damping's share included."""
        return float((error @ self.matrix).mul_(error).sum(dtype=torch.float64))


def factor_hessian(second: Tensor, name: str = "linear", damping: float = DAMPING) -> Hessian:
    """The Hessian of second moments E[x x^T] (K, K), channels of much power first (act-order).

    Raises FormatError, naming the linear, if the moments are no covariance: not finite, or far from semi-definite.
    """
    power = second.diagonal().double()
    mean = power.mean()
    if not torch.isfinite(mean) or mean < 0:
        raise FormatError(f"{name}: its input's moments are not finite; a calibration input held NaN or Inf")
    mean = torch.where(mean > 0, mean, 1.0)
    order = power.argsort(descending=True, stable=True)
    backwards = order.flip(0)
    ordered = second[backwards.unsqueeze(1), backwards].double()
    for retry in range(RETRIES):
        damped = power + mean * damping * 2**retry
        ordered.diagonal().copy_(damped[backwards])
        lower, info = torch.linalg.cholesky_ex(ordered)
        if int(info) == 0:
            del ordered
            factor = lower.float().flip(0, 1).contiguous()
            matrix = second.to(torch.float32, copy=True)
            matrix.diagonal().copy_(damped)
            return Hessian(matrix, order, factor)
    raise FormatError(f"{name}: its input's moments are no covariance; collect them anew")


def smoothed_hessian(
    moments: InputMoments,
    smooth: Tensor,  # (K,) float32
    *,
    centered: bool = False,
    shrunk: bool = True,
) -> Hessian:
    """The Hessian of x / smooth, or of its difference from the mean, for layers whose bias takes up the mean error."""
    scales = smooth.double().reciprocal()
    second = moments.covariance(centered=centered, shrunk=shrunk)
    return factor_hessian(second.mul_(scales).mul_(scales.unsqueeze(1)), moments.name)
