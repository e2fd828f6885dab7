"""The inner loop of coordinate descent: the codes of one group chosen anew in turn, each row of the weight for itself.

As in `gptq_columns`: a warp holds the gradient of all of the group's columns for a few rows in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tonfa.kernels.triton.device import ROUND
from tonfa.kernels.triton.launch import launch

ROWS = 8
"""Rows of the weight a warp."""


@triton.jit(do_not_specialize=["N"])
def descent_columns_kernel(
    codes,  # (C, N) float32, changed in place
    step,  # (N,) float32
    ratios,  # (C, N) float32
    gradient,  # (C, N) float32, changed in place
    local,  # (C, C) float32, symmetric
    N,
    lowest,
    COLUMNS: tl.constexpr,  # C
    ROWS: tl.constexpr,
):
    """ROWS rows of the weight, which are columns here."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = n < N
    column = tl.arange(0, COLUMNS)
    tile = column[:, None] * N + n[None, :]
    held = tl.load(gradient + tile, mask=live[None, :], other=0)
    steps = tl.load(step + n, mask=live, other=0)
    for j in range(COLUMNS):
        before = tl.load(codes + j * N + n, mask=live, other=0)
        ratio = tl.load(ratios + j * N + n, mask=live, other=0)
        weights = tl.load(local + j * COLUMNS + column)
        slope = tl.sum(tl.where(column[:, None] == j, held, 0.0), axis=0)
        best = tl.minimum(tl.maximum(before - slope * ratio, lowest), 7.0)
        best = (best + ROUND) - ROUND
        best = tl.where(steps == 0.0, before, best)
        tl.store(codes + j * N + n, best, mask=live)
        held += weights[:, None] * ((best - before) * steps)[None, :]
    tl.store(gradient + tile, held, mask=live[None, :])


def descent_columns(
    codes: Tensor,  # (C, N) float32
    step: Tensor,  # (N,) float32
    ratios: Tensor,  # (C, N) float32: 1 / (step * power of the channel), 0 for a step of 0
    gradient: Tensor,  # (C, N) float32
    local: Tensor,  # (C, C) float32
    lowest: int,
) -> tuple[Tensor, Tensor]:
    """Codes and gradient (C, N) after one pass over C columns, a power of two."""
    columns, n = codes.shape
    codes, gradient = (t.clone(memory_format=torch.contiguous_format) for t in (codes, gradient))
    inputs = (codes, step.contiguous(), ratios.contiguous(), gradient, local.contiguous())
    grid = (triton.cdiv(n, ROWS), 1, 1)
    launch(descent_columns_kernel, grid, (*inputs, n, float(lowest), columns, ROWS), num_warps=1)
    return codes, gradient
