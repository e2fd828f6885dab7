"""The inner loop of GPTQ: columns coded one after another, each row of the weight for itself, in one launch.

In PyTorch a column costs five launches of microseconds each, for a hundred thousand columns of a FLUX: minutes in which
the GPU computes nothing. Here a warp holds all columns of a few rows in registers. A column is taken out of them by a
masked sum, which costs as much as the update that follows it.
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
def gptq_columns_kernel(
    rest,  # (C, N) float32
    feedback,  # (C, C) float32, upper triangular, rows divided by their diagonal
    steps,  # (C, N) float32
    inverse_steps,  # (C, N) float32
    codes,  # (C, N) float32
    errors,  # (C, N) float32
    N,
    lowest,
    COLUMNS: tl.constexpr,  # C
    ROWS: tl.constexpr,
):
    """ROWS rows of the weight, which are columns here."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = n < N
    column = tl.arange(0, COLUMNS)
    held = tl.load(rest + column[:, None] * N + n[None, :], mask=live[None, :], other=0)
    for j in range(COLUMNS):
        step = tl.load(steps + j * N + n, mask=live, other=0)
        inverse_step = tl.load(inverse_steps + j * N + n, mask=live, other=0)
        weights = tl.load(feedback + j * COLUMNS + column)
        value = tl.sum(tl.where(column[:, None] == j, held, 0.0), axis=0)
        code = tl.minimum(tl.maximum(value * inverse_step, lowest), 7.0)
        code = (code + ROUND) - ROUND
        error = value - code * step
        tl.store(codes + j * N + n, code, mask=live)
        tl.store(errors + j * N + n, error, mask=live)
        held -= tl.where(column > j, weights, 0.0)[:, None] * error[None, :]


def gptq_columns(
    rest: Tensor,  # (C, N) float32
    feedback: Tensor,  # (C, C) float32
    steps: Tensor,  # (C, N) float32
    inverse_steps: Tensor,  # (C, N) float32
    lowest: int,
) -> tuple[Tensor, Tensor]:
    """Codes in [lowest, 7] of C columns, a power of two, and their errors, (C, N) float32."""
    columns, n = rest.shape
    codes, errors = (torch.empty(columns, n, device=rest.device) for _ in range(2))
    inputs = (t.contiguous() for t in (rest, feedback, steps, inverse_steps))
    grid = (triton.cdiv(n, ROWS), 1, 1)
    launch(gptq_columns_kernel, grid, (*inputs, codes, errors, n, float(lowest), columns, ROWS), num_warps=1)
    return codes, errors
