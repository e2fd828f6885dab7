"""GPTQ (Frantar et al., arXiv 2210.17323): codes whose errors the channels that are quantized later make up for.

Channels are taken in the Hessian's order (act-order) with scales that were found before (static groups), 128 at a time,
all rows at once: inside of a block a loop over columns, across blocks one product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tonfa.formats import GROUP_SIZE
from tonfa.quantize.hessian import Hessian

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
    reciprocal = torch.where(steps == 0, 0.0, steps.reciprocal())
    codes = torch.empty_like(rest)
    k = rest.shape[1]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        block, feedback = rest[:, start:stop].T.contiguous(), hessian.inverse[start:stop, start:stop]
        feedback = feedback / feedback.diagonal().unsqueeze(1)
        step, inverse_step = steps[:, start:stop].T.contiguous(), reciprocal[:, start:stop].T.contiguous()
        chosen, errors = torch.empty_like(block), torch.empty_like(block)
        for j in range(stop - start):
            torch.mul(block[j], inverse_step[j], out=chosen[j])
            chosen[j].round_().clamp_(lowest, 7)
            torch.addcmul(block[j], chosen[j], step[j], value=-1, out=errors[j])
            block[j + 1 :].addr_(feedback[j, j + 1 :], errors[j], alpha=-1)
        codes[:, start:stop] = chosen.T
        scaled = errors / hessian.inverse.diagonal()[start:stop].unsqueeze(1)
        rest[:, stop:].addmm_(scaled.T, hessian.inverse[start:stop, stop:], alpha=-1)
    found = torch.empty_like(codes)
    found[:, hessian.order] = codes
    return found
