"""The two loops over columns that GPTQ and coordinate descent are made of: in PyTorch, and on a GPU in one launch each.

Columns depend on one another, rows do not. The loops below are the specification; Triton's kernels compute the same in
registers, about a hundred times as fast as launching each operation (an estimate from 5 us a launch).
"""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def code_columns(
    rest: Tensor,  # (C, N) float32, changed in place
    feedback: Tensor,  # (C, C) float32, upper triangular, rows divided by their diagonal
    steps: Tensor,  # (C, N) float32
    inverse_steps: Tensor,  # (C, N) float32, 0 where the step is 0
    lowest: int,
) -> tuple[Tensor, Tensor]:
    """Codes in [lowest, 7] and errors, (C, N) float32, of columns coded in turn, later ones making up for errors."""
    if _has_kernels(rest.device) and _power_of_two(len(rest)):
        from tonfa.kernels.triton.gptq_columns import gptq_columns

        return gptq_columns(rest, feedback, steps, inverse_steps, lowest)
    codes, errors = torch.empty_like(rest), torch.empty_like(rest)
    for j in range(len(rest)):
        torch.mul(rest[j], inverse_steps[j], out=codes[j])
        codes[j].round_().clamp_(lowest, 7)
        torch.addcmul(rest[j], codes[j], steps[j], value=-1, out=errors[j])
        rest[j + 1 :].addr_(feedback[j, j + 1 :], errors[j], alpha=-1)
    return codes, errors


def recode_columns(
    codes: Tensor,  # (C, N) float32
    step: Tensor,  # (N,) float32
    gradient: Tensor,  # (C, N) float32: half the derivative of the error by the weights
    local: Tensor,  # (C, C) float32: the Hessian among the columns
    lowest: int,
) -> tuple[Tensor, Tensor]:
    """Each column's codes chosen anew in turn, the best for all others as they are; with the gradient then."""
    ratios = torch.where(step == 0, 0.0, step.reciprocal()) / local.diagonal().unsqueeze(1)
    if _has_kernels(codes.device) and _power_of_two(len(codes)):
        from tonfa.kernels.triton.descent_columns import descent_columns

        return descent_columns(codes, step, ratios, gradient, local, lowest)
    codes, gradient = codes.clone(), gradient.clone()
    for j in range(len(codes)):
        best = (codes[j] - gradient[j] * ratios[j]).round_().clamp_(lowest, 7)
        gradient.addr_(local[j], (best - codes[j]).mul_(step))
        codes[j] = torch.where(step == 0, codes[j], best)
    return codes, gradient


def _power_of_two(count: int) -> bool:
    return count & (count - 1) == 0


@lru_cache(maxsize=16)
def _has_kernels(device: torch.device) -> bool:
    """Whether Triton compiles and runs the kernels on this device; where it should and does not, the log says why."""
    if device.type != "cuda" or find_spec("triton") is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from tonfa.kernels.triton.gptq_columns import gptq_columns

        one = torch.ones(16, 16, device=device)
        gptq_columns(one, one, one, one, -8)
        torch.cuda.synchronize(device)
    except Exception as error:  # a missing compiler, an unwritable cache: whatever it is, the loops go without
        log.warning("quantizing runs column by column, many times slower, as Triton fails on %s: %s", device, error)
        return False
    return True
