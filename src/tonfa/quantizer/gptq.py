"""GPTQ (Frantar et al., arXiv 2210.17323): codes whose errors the channels that are quantized later make up for.

Channels are taken in the Hessian's order (act-order) with scales that were found before (static groups), 128 at a time,
all rows at once: inside of a block a loop over columns, across blocks one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tonfa.formats import GROUP_SIZE
from tonfa.quantizer.columns import code_columns
from tonfa.quantizer.hessian import Hessian

BLOCK = 128


def gptq(
    target: Tensor,  # (N, K) float32
    scales: Tensor,  # (N, K/G) float32, may be negative or 0
    hessian: Hessian,
    lowest: int = -8,
) -> Tensor:
    """Codes (N, K) in [lowest, 7], float32. A scale of 0 gives code 0."""
    rest = target[:, hessian.order]
    steps = scales.repeat_interleave(GROUP_SIZE, dim=1)[:, hessian.order]
    codes = torch.empty_like(rest)
    k = rest.shape[1]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        inverse = hessian.inverse[start:stop, start:]
        feedback = inverse / inverse.diagonal().unsqueeze(1)
        step = steps[:, start:stop].T.contiguous()
        reciprocal = torch.where(step == 0, 0.0, step.reciprocal())
        block = rest[:, start:stop].T.contiguous()
        chosen, errors = code_columns(block, feedback[:, : stop - start], step, reciprocal, lowest)
        codes[:, start:stop] = chosen.T
        rest[:, stop:].addmm_(errors.T, feedback[:, stop - start :], alpha=-1)
    found = torch.empty_like(codes)
    found[:, hessian.order] = codes
    return found
