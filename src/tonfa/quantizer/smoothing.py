"""The published search for the smoothing factors of one input (SVDQuant, arXiv 2411.05007; SmoothQuant's form).

    smooth_j = span(X_j)^alpha / span(W_j)^beta        x is divided by it, column j of the weight multiplied

The grid is the one of the released configuration: (0, 0), (a, 0) and (a, 1 - a) for a = 1/20 ... 19/20, 39 candidates.
Each is judged by the error of the outputs of all weights that read the input, with a one-shot branch, weights rounded
to nearest and quantized activations. The released code compares the output of a whole attention where we compare that
of the linears; its span is the absolute maximum, `"rms"` is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tonfa.formats import INT4
from tonfa.ops.activation import Activations
from tonfa.quantizer.judge import Judge
from tonfa.quantizer.lowrank import low_rank
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.split import Quantizer, rounded_branch

Span = Literal["absmax", "rms"]
GRID = 20
SEARCH_TOKENS = 2048
"""Of the sample, that candidates are judged on."""


def candidates() -> list[tuple[float, float]]:
    """Pairs (alpha, beta)."""
    steps = [i / GRID for i in range(1, GRID)]
    return [(0.0, 0.0), *((a, 0.0) for a in steps), *((a, 1 - a) for a in steps)]


def spans(weights: Sequence[Tensor], moments: InputMoments, span: Span) -> tuple[Tensor, Tensor]:
    """The spans (K,) float32 of the input's channels and of the columns of all weights together."""
    if span == "absmax":
        return moments.absmax, torch.stack([w.abs().amax(dim=0) for w in weights]).amax(dim=0)
    rows = sum(w.shape[0] for w in weights)
    return moments.rms(), (torch.stack([w.square().sum(dim=0) for w in weights]).sum(dim=0) / rows).sqrt()


def smoothing(x_span: Tensor, w_span: Tensor, alpha: float, beta: float, dtype: torch.dtype) -> Tensor:
    """Factors (K,) of `dtype`; a span of zero counts as one, a factor that `dtype` cannot hold becomes one."""
    one = torch.ones_like(x_span)
    found = torch.where(x_span > 0, x_span, one) ** alpha / torch.where(w_span > 0, w_span, one) ** beta
    found = found.to(dtype)
    return torch.where(torch.isfinite(found) & (found > 0), found, 1.0)


def search_smoothing(
    weights: Sequence[Tensor],  # (N_i, K) float32 each, all that read the input
    moments: InputMoments,
    quantizer: Quantizer,
    *,
    rank: int,
    activations: Activations = "int4",
    unsigned: bool = False,
    span: Span = "absmax",
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The best factors (K,) of `dtype`; of equal candidates the later."""
    x_span, w_span = spans(weights, moments, span)
    judges = [Judge(moments.sample[:SEARCH_TOKENS], w, activations, unsigned) for w in weights]
    subspaces: list[Tensor | None] = [None] * len(weights)
    best, least = torch.ones_like(x_span, dtype=dtype), float("inf")
    for alpha, beta in candidates():
        smooth = smoothing(x_span, w_span, alpha, beta, dtype)
        values, error = smooth.float(), 0.0
        for i, (weight, judge) in enumerate(zip(weights, judges, strict=True)):
            smoothed = weight * values
            factors = low_rank(smoothed, rank, start=subspaces[i], seed=seed)
            subspaces[i] = factors.subspace
            rest = smoothed - rounded_branch(factors, values, dtype).smoothed(values)
            codes, scales = quantizer(rest)
            error += judge.error(smooth, INT4.dequantize(codes, scales), rest)
        if error <= least:
            best, least = smooth, error
    return best
