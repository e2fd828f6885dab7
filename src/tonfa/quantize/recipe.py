"""Recipes: which steps make a 4-bit linear of a dense one, in which order: smooth, low rank, residual, export.

The data-free recipe has no activations to smooth, so its smoothing factors are one, and it judges by the error of the
weight: it alternates L = SVD_R(W - Q) and Q = round(W - L) and keeps the best pair. Relative errors of a Gaussian
weight 768 x 768 at rank 32: one shot with absmax / 7 scales (the paper) 0.0997, eight alternations of it 0.0851, one
shot with `residual`'s scales 0.0843, eight alternations with them 0.0720.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tonfa.errors import FormatError, UnsupportedError
from tonfa.formats import GELU_SHIFT, INT4
from tonfa.quantize.checks import check_linear
from tonfa.quantize.lowrank import low_rank
from tonfa.quantize.residual import quantize_residual
from tonfa.weights import SVDQWeights

DEFAULT_RANK = 32
RANK_STEP = 16
"""Tensor cores and the published kernels take the branch's width in steps of 16."""


@dataclass(frozen=True)
class Recipe:
    """The settings of the data-free quantizer. Raises UnsupportedError for settings that it does not know."""

    rank: int = DEFAULT_RANK
    """Width R of the low-rank branch, a multiple of 16."""
    iterations: int = 8
    """Alternations of branch and residual after the first pass."""
    seed: int = 0
    """Of the randomized decompositions: equal seeds give equal bytes on one kind of device."""

    def __post_init__(self) -> None:
        least = {"rank": RANK_STEP, "iterations": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UnsupportedError(f"recipe: {name} must be an integer of at least {low}, got {value!r}")
        if self.rank % RANK_STEP:
            raise UnsupportedError(f"recipe: rank must be a multiple of {RANK_STEP} for the kernels, got {self.rank}")


@dataclass(frozen=True)
class _Split:
    """weight (N, K) = up @ down^T + codes * scales + error."""

    down: Tensor  # (K, R) 16-bit
    up: Tensor  # (N, R) 16-bit
    codes: Tensor  # (N, K) int8
    scales: Tensor  # (N, K/G) 16-bit


def _split(weight: Tensor, recipe: Recipe, dtype: torch.dtype, name: str) -> _Split:
    """The best split of a float32 weight (N, K) that the alternation meets. FormatError if its squares overflow."""
    best, least = None, math.inf
    target, subspace = weight, None
    for _ in range(1 + recipe.iterations):
        factors = low_rank(target, recipe.rank, start=subspace, seed=recipe.seed)
        subspace = factors.subspace
        down, up = factors.rounded(dtype)
        residual = torch.addmm(weight, up.float(), down.float().T, alpha=-1)
        codes, scales = quantize_residual(residual, dtype)
        quantized = INT4.dequantize(codes, scales)
        error = float(torch.linalg.vector_norm(residual.sub_(quantized)))
        if error < least:
            best, least = _Split(down, up, codes, scales), error
        target = torch.sub(weight, quantized, out=quantized)
    if best is None:
        raise FormatError(f"{name}.weight: values are too large to be squared in float32; the source is damaged")
    return best


def quantize_linear(
    weight: Tensor,  # (N, K) float
    bias: Tensor | None,  # (N,) float
    recipe: Recipe,
    *,
    unsigned: bool = False,
    dtype: torch.dtype | None = None,
    name: str = "linear",
) -> SVDQWeights:
    """A dense linear as 4-bit weights with a low-rank branch, on the weight's device.

    `dtype` is that of scales, branch and bias, by default the weight's. `unsigned` marks a linear behind a GELU: its
    bias then holds the correction for formats.GELU_SHIFT. Raises FormatError, naming the linear `name`, for K that is
    no multiple of 64, a rank above min(N, K), NaN or Inf.
    """
    dtype = weight.dtype if dtype is None else dtype
    check_linear(name, weight, bias, dtype)
    n, k = weight.shape
    if recipe.rank > min(n, k):
        raise FormatError(f"{name}.weight: rank {recipe.rank} exceeds the smaller side of {n} x {k}; lower the rank")
    smooth_factor = torch.ones(k, dtype=dtype, device=weight.device)
    split = _split(weight.float(), recipe, dtype, name)
    return _export(split, smooth_factor, bias, unsigned)


def _export(split: _Split, smooth_factor: Tensor, bias: Tensor | None, unsigned: bool) -> SVDQWeights:
    """The split of a smoothed weight in the canonical layout: `proj_down` divided, an unsigned layer's bias shifted."""
    smooth = smooth_factor.float()
    dtype = smooth_factor.dtype
    exported = smooth.new_zeros(split.codes.shape[0]) if bias is None else bias.float()
    if unsigned:
        exported = exported - GELU_SHIFT * (INT4.dequantize(split.codes, split.scales) / smooth).sum(dim=1)
    return SVDQWeights(
        qweight=INT4.pack(split.codes),
        wscales=split.scales.T.contiguous(),
        smooth_factor=smooth_factor,
        proj_down=(split.down.float() / smooth.unsqueeze(1)).to(dtype),
        proj_up=split.up,
        bias=exported.to(dtype),
        unsigned=unsigned,
    )
