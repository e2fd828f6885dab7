"""Coordinate descent on codes and scales: each step finds the exact minimum of the output error in one code or scale.

GPTQ never looks back at a code; here every code is chosen anew while all others are as they are, and each group's scale
is fitted to its codes by least squares under the Hessian. The error never rises. Groups are visited in order, all rows
at once; a sweep costs about what GPTQ does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tonfa.formats import GROUP_SIZE
from tonfa.quantizer.columns import recode_columns
from tonfa.quantizer.hessian import Hessian


def _rescale(codes: Tensor, step: Tensor, gradient: Tensor, local: Tensor, dtype: torch.dtype) -> Tensor:
    """The best steps (N,) for these codes, rounded to `dtype`, where they are better than those given."""
    slope = (gradient * codes).sum(dim=0)
    curvature = (codes * (local @ codes)).sum(dim=0)
    found = (step - slope / torch.where(curvature > 0, curvature, torch.inf)).to(dtype).float()
    change = found - step
    return torch.where(change * (2 * slope + change * curvature) < 0, found, step)


def refine(
    target: Tensor,  # (N, K) float32
    codes: Tensor,  # (N, K) float32
    scales: Tensor,  # (N, K/G) float32, representable in `dtype`
    hessian: Hessian,
    dtype: torch.dtype,
    *,
    sweeps: int,
    lowest: int = -8,
) -> tuple[Tensor, Tensor]:
    """Codes and scales (of `dtype`'s numbers, in float32) after some sweeps; never worse than those given."""
    codes, scales = codes.clone(), scales.clone()
    error = (codes.unflatten(1, (-1, GROUP_SIZE)) * scales.unsqueeze(2)).flatten(1) - target
    for _ in range(sweeps):
        for group in range(scales.shape[1]):
            columns = slice(group * GROUP_SIZE, (group + 1) * GROUP_SIZE)
            rows = hessian.matrix[columns]
            gradient, local = rows @ error.T, rows[:, columns]
            chosen, step = codes[:, columns].T, scales[:, group]
            before = chosen * step
            chosen, gradient = recode_columns(chosen, step, gradient, local, lowest)
            step = _rescale(chosen, step, gradient, local, dtype)
            error[:, columns] += (chosen * step - before).T
            codes[:, columns], scales[:, group] = chosen.T, step
    return codes, scales
