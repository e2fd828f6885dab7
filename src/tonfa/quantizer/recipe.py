"""Recipes: which steps make a 4-bit linear of a dense one, in which order: smooth, low rank, residual, export.

| recipe | smoothing | branch | 4-bit part |
|---|---|---|---|
| `svdquant` | the published grid | SVD of W, or alternated | absmax / 7, rounded to nearest |
| `svdquant-gptq` | the published grid | alternated, as released | absmax / 7, GPTQ |
| `tonfa` | learned | alternated, then refitted under the covariance | [-8, 7], searched scales, GPTQ, descent |

Without calibration data the smoothing factors are one, or powers of the weight's columns, and the error is that of the
weight: `tonfa` alternates L = SVD_R(W - Q) and Q = round(W - L) and keeps the best pair. Relative errors of a Gaussian
weight 768 x 768 at rank 32: one shot with absmax / 7 scales (the paper) 0.0997, eight alternations of it 0.0851, one
shot with `residual`'s scales 0.0843, eight alternations with them 0.0720.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from tonfa.errors import FormatError, UnsupportedError
from tonfa.formats import GELU_SHIFT, INT4
from tonfa.ops.activation import Activations, parse_activations
from tonfa.quantizer.calibrated import calibrate
from tonfa.quantizer.checks import check_linear
from tonfa.quantizer.gptq import gptq
from tonfa.quantizer.hessian import smoothed_hessian
from tonfa.quantizer.judge import Judge
from tonfa.quantizer.learned import learn_smoothing
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.residual import absmax_scales, nearest, quantize_residual
from tonfa.quantizer.smoothing import SEARCH_TOKENS, search_smoothing, smoothing
from tonfa.quantizer.split import Quantizer, Split, alternate
from tonfa.weights import SVDQWeights

DEFAULT_RANK = 32
RANK_STEP = 16
"""Tensor cores and the published kernels take the branch's width in steps of 16."""

Method = Literal["tonfa", "svdquant"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Recipe:
    """The settings of the quantizer. Raises UnsupportedError for settings that it does not know."""

    rank: int = DEFAULT_RANK
    """Width R of the low-rank branch, a multiple of 16."""
    iterations: int = 8
    """Alternations of branch and residual after the first pass."""
    seed: int = 0
    """Of the randomized decompositions: equal seeds give equal bytes on one kind of device."""
    method: Method = "tonfa"
    gptq: bool = True
    """Whether codes follow GPTQ where there is calibration data; `tonfa` always does."""
    activations: Activations = "int4"
    """What the smoothing is chosen for. The checkpoint runs with all others too."""
    column_power: float = 0.0
    """Without calibration data, smoothing factors are the columns' RMS to minus this power: good for weights whose
    columns are smaller where the input is larger, harmful for the opposite. 0 assumes nothing. In the demo model
    columns are larger there, and 0.5 changes the error by 1 %."""

    def __post_init__(self) -> None:
        least = {"rank": RANK_STEP, "iterations": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise UnsupportedError(f"recipe: {name} must be an integer of at least {low}, got {value!r}")
        if self.rank % RANK_STEP:
            raise UnsupportedError(f"recipe: rank must be a multiple of {RANK_STEP} for the kernels, got {self.rank}")
        if self.method not in METHODS:
            raise UnsupportedError(f"recipe: method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if not isinstance(self.column_power, (int, float)) or not 0 <= self.column_power <= 2:
            raise UnsupportedError(f"recipe: column_power must lie in [0, 2], got {self.column_power!r}")
        parse_activations(self.activations)


RECIPES = {
    "tonfa": Recipe(),
    "svdquant": Recipe(iterations=0, method="svdquant", gptq=False),
    "svdquant-gptq": Recipe(iterations=100, method="svdquant", gptq=True),
}
"""Recipes by the name that users write: the best, the paper's, the released configuration's best."""


def named_recipe(name: str, rank: int = DEFAULT_RANK) -> Recipe:
    """The recipe of this name; raises UnsupportedError if there is none."""
    if name not in RECIPES:
        raise UnsupportedError(f"recipe {name!r} is unknown; choose one of {', '.join(RECIPES)}")
    return replace(RECIPES[name], rank=rank)


def _round_absmax(residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The published residual: codes (N, K) in [-7, 7] and scales absmax / 7 (N, K/G)."""
    scales = absmax_scales(residual, dtype)
    return nearest(residual, scales, lowest=-7), scales.to(dtype)


def _quantizer(recipe: Recipe, dtype: torch.dtype) -> Quantizer:
    return partial(quantize_residual if recipe.method == "tonfa" else _round_absmax, dtype=dtype)


def find_smoothing(
    weights: Sequence[Tensor],  # (N_i, K) float each: all linears that read this input
    moments: InputMoments | None,
    recipe: Recipe,
    *,
    unsigned: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The smoothing factors (K,) of `dtype` that linears with a common input share; without moments, of the weights."""
    rows = [w.float() for w in weights]
    if moments is None:
        columns = torch.cat(rows).square().mean(dim=0).sqrt()
        return smoothing(torch.ones_like(columns), columns, 0.0, recipe.column_power, dtype)
    moments.check(rows[0].shape[1])
    moments = moments.to(rows[0].device)
    rank, seed, activations = recipe.rank, recipe.seed, recipe.activations
    if recipe.method == "svdquant":
        rounding = _quantizer(recipe, dtype)
        return search_smoothing(
            rows, moments, rounding, rank=rank, seed=seed, activations=activations, unsigned=unsigned, dtype=dtype
        )
    return learn_smoothing(rows, moments, rank=rank, seed=seed, activations=activations, unsigned=unsigned, dtype=dtype)


def _without_data(weight: Tensor, smooth: Tensor, recipe: Recipe, dtype: torch.dtype, name: str) -> Split:
    """The alternation judged by the error of the smoothed weight (N, K)."""
    return alternate(
        weight,
        smooth,
        _quantizer(recipe, dtype),
        lambda error, _: float(torch.linalg.vector_norm(error)),
        rank=recipe.rank,
        iterations=recipe.iterations,
        stop_early=False,
        seed=recipe.seed,
        dtype=dtype,
        name=name,
    )


def _published(
    weight: Tensor, smooth: Tensor, moments: InputMoments, recipe: Recipe, unsigned: bool, dtype: torch.dtype, name: str
) -> Split:
    """SVDQuant's split of a smoothed weight (N, K), judged with quantized activations; then GPTQ, if asked for."""
    judge = Judge(moments.sample[:SEARCH_TOKENS], weight / smooth, recipe.activations, unsigned)
    stored = smooth.to(dtype)

    def measure(error: Tensor, split: Split) -> float:
        quantized = split.quantized()
        return judge.error(stored, quantized, error + quantized)

    split = alternate(
        weight,
        smooth,
        _quantizer(recipe, dtype),
        measure,
        rank=recipe.rank,
        iterations=recipe.iterations,
        stop_early=True,
        seed=recipe.seed,
        dtype=dtype,
        name=name,
    )
    if not recipe.gptq:
        return split
    hessian = smoothed_hessian(moments, smooth, shrunk=False)
    residual = weight - split.branch.smoothed(smooth)
    scales = absmax_scales(residual, dtype)
    return replace(split, codes=gptq(residual, scales, hessian, lowest=-7).to(torch.int8), scales=scales.to(dtype))


def quantize_linear(
    weight: Tensor,  # (N, K) float
    bias: Tensor | None,  # (N,) float
    recipe: Recipe,
    *,
    moments: InputMoments | None = None,
    smooth_factor: Tensor | None = None,  # (K,) of find_smoothing
    unsigned: bool = False,
    dtype: torch.dtype | None = None,
    name: str = "linear",
) -> SVDQWeights:
    """A dense linear as 4-bit weights with a low-rank branch, on the weight's device.

    `moments` are those of its calibration inputs, without which the recipe works on the weight alone; a
    `smooth_factor` is given to linears that share their input. `dtype` is that of scales, branch and bias, by default
    the weight's. `unsigned` marks a linear behind a GELU: its bias then holds the correction for formats.GELU_SHIFT
    and, with the recipe `tonfa` and moments, that for the mean of the weights' error. Raises FormatError, naming the
    linear `name`, for K that is no multiple of 64, a rank above min(N, K), NaN or Inf.
    """
    dtype = weight.dtype if dtype is None else dtype
    check_linear(name, weight, bias, dtype)
    n, k = weight.shape
    if recipe.rank > min(n, k):
        raise FormatError(f"{name}.weight: rank {recipe.rank} exceeds the smaller side of {n} x {k}; lower the rank")
    dense = weight.float()
    if moments is not None:
        moments.check(k)
        moments = moments.to(weight.device)
    smooth_factor = _smooth_factor(dense, recipe, moments, smooth_factor, unsigned, dtype, name)
    smooth = smooth_factor.float()
    smoothed = dense * smooth
    correction = None
    if moments is None:
        split = _without_data(smoothed, smooth, recipe, dtype, name)
    elif recipe.method == "svdquant":
        split = _published(smoothed, smooth, moments, recipe, unsigned, dtype, name)
    else:
        hessian = smoothed_hessian(moments, smooth, centered=unsigned)
        first = _without_data(smoothed, smooth, recipe, dtype, name)
        split = calibrate(smoothed, smooth, first.branch, hessian, rank=recipe.rank, seed=recipe.seed, dtype=dtype)
        if unsigned:
            error = smoothed - split.branch.smoothed(smooth) - split.quantized()
            correction = error @ (moments.mean() / smooth)
    return _export(split, smooth_factor, bias, correction, unsigned)


def _smooth_factor(
    weight: Tensor,
    recipe: Recipe,
    moments: InputMoments | None,
    given: Tensor | None,
    unsigned: bool,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    """The factors (K,) of `dtype` that are given, or found for the weight (N, K) alone."""
    if given is not None:
        stored = given.to(weight.device, dtype)
        if tuple(stored.shape) != (weight.shape[1],) or not bool((torch.isfinite(stored) & (stored > 0)).all()):
            raise FormatError(f"{name}.smooth_factor: expected {weight.shape[1]} positive numbers")
        return stored
    return find_smoothing([weight], moments, recipe, unsigned=unsigned, dtype=dtype)


def _export(
    split: Split, smooth_factor: Tensor, bias: Tensor | None, correction: Tensor | None, unsigned: bool
) -> SVDQWeights:
    """A split in the canonical layout; `correction` (N,) is added to the bias, an unsigned layer's shift taken off."""
    exported = torch.zeros(split.codes.shape[0], device=split.codes.device) if bias is None else bias.float()
    if correction is not None:
        exported = exported + correction
    if unsigned:
        exported = exported - GELU_SHIFT * (split.quantized() / smooth_factor.float()).sum(dim=1)
    return SVDQWeights(
        qweight=INT4.pack(split.codes),
        wscales=split.scales.T.contiguous(),
        smooth_factor=smooth_factor,
        proj_down=split.branch.down,
        proj_up=split.branch.up,
        bias=exported.to(smooth_factor.dtype),
        unsigned=unsigned,
    )
