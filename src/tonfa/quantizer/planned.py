"""One linear, one block or a whole model in memory, made as its plan says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from tonfa.checkpoint.strict import Spec
from tonfa.errors import FormatError
from tonfa.formats import GROUP_SIZE
from tonfa.plan import LinearPlan, ModelPlan
from tonfa.quantizer.modulation import quantize_modulation
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.recipe import Recipe, quantize_linear
from tonfa.quantizer.threads import suited_threads
from tonfa.weights import StackedWeights, SVDQWeights, W4A16Weights


class Reader(Protocol):
    """Tensors by name, such as a state dict or a `checkpoint.tensors.TensorFolder`."""

    def __getitem__(self, name: str, /) -> Tensor:
        """The tensor of this name."""
        ...


def gather(linear: LinearPlan, source: Reader, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """The dense weight (N, K) and bias (N,) of a planned linear: rows stacked, columns cut.

    `device` None leaves the tensors where the source has them.
    """
    columns = slice(None) if linear.columns is None else slice(*linear.columns)
    weight = torch.cat([source[f"{name}.weight"][:, columns].to(device) for name in linear.sources])
    if linear.source_bias:
        return weight, torch.cat([source[f"{name}.bias"].to(device) for name in linear.sources])
    return weight, weight.new_zeros(weight.shape[0])


def quantize_planned(
    linear: LinearPlan,
    weight: Tensor,
    bias: Tensor,
    recipe: Recipe,
    dtype: torch.dtype,
    moments: InputMoments | None = None,
    smooth_factor: Tensor | None = None,
) -> SVDQWeights | W4A16Weights:
    """The gathered linear in the form that the plan asks for, its scales in `dtype`, on the weight's device.

    `moments` are those of its input, `smooth_factor` (K,) what it shares with others; a modulation needs neither.
    """
    with suited_threads(weight.numel()):
        if linear.kind == "w4a16":
            return quantize_modulation(weight, bias, linear.plus_one, dtype=dtype, name=linear.name)
        return quantize_linear(
            weight,
            bias,
            recipe,
            moments=moments,
            smooth_factor=smooth_factor,
            unsigned=linear.unsigned,
            dtype=dtype,
            name=linear.name,
        )


def check_rank(plan: ModelPlan, recipe: Recipe) -> None:
    """Raise FormatError, naming the first linear of the plan that is too small for the recipe's branch."""
    for linear in plan.linears():
        n, k = linear.out_features, linear.in_features
        if linear.kind == "svdq" and (linear.rank or recipe.rank) > min(n, k):
            raise FormatError(
                f"{linear.name}.weight: rank {recipe.rank} exceeds the smaller side of {n} x {k}; lower the rank"
            )


def relative_error(weight: Tensor, weights: SVDQWeights | W4A16Weights | StackedWeights) -> float:
    """||W - W_quantized|| / ||W|| in the Frobenius norm, 0 for an exact zero."""
    dense = weight.float()
    error = torch.linalg.vector_norm(dense - weights.dense()[0])
    return float(error / torch.linalg.vector_norm(dense).clamp_min(torch.finfo(torch.float32).tiny))


def part_names(linear: LinearPlan) -> tuple[str, ...]:
    """The modules that hold a planned linear's tensors: itself, or its parts."""
    return (linear.name,) if linear.parts == 1 else tuple(f"{linear.name}.parts.{i}" for i in range(linear.parts))


def planned_spec(linear: LinearPlan, rank: int, dtype: torch.dtype) -> Spec:
    """Names, shapes and dtypes of the tensors that a planned linear becomes; `rank` where it has none of its own."""
    n, k, rank = linear.out_features // linear.parts, linear.in_features, linear.rank or rank
    groups = ((k // GROUP_SIZE, n), dtype)
    fields: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "qweight": ((n, k // 2), torch.uint8),
        "wscales": groups,
        "bias": ((n,), dtype),
    }
    if linear.kind == "w4a16":
        fields |= {"wzeros": groups}
    else:
        fields |= {"smooth_factor": ((k,), dtype), "proj_down": ((k, rank), dtype), "proj_up": ((n, rank), dtype)}
    return {f"{name}.{field}": entry for name in part_names(linear) for field, entry in fields.items()}


def dense_spec(plan: ModelPlan, copies: Spec, dtype: torch.dtype) -> Spec:
    """Names and shapes of the dense tensors that a plan needs; `copies` has the shapes of the copied ones."""
    spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for linear in plan.linears():
        rows = linear.out_features // len(linear.sources)
        width = linear.in_features if linear.columns is None else linear.columns[1]
        for name in linear.sources:
            known = spec.get(f"{name}.weight", ((0, 0), dtype))[0][1]
            spec[f"{name}.weight"] = ((rows, max(width, known)), dtype)
            if linear.source_bias:
                spec[f"{name}.bias"] = ((rows,), dtype)
    return spec | {name: (shape, dtype) for name, (shape, _) in copies.items()}


def materialize(plan: ModelPlan, source: Mapping[str, Tensor], recipe: Recipe | None) -> dict[str, Tensor]:
    """A model's state dict, quantized in memory on the source's device and in its dtype.

    Without a recipe the linears stay dense, as `<name>.weight` and `<name>.bias`.
    """
    tensors: dict[str, Tensor] = {}
    for block in plan.blocks:
        tensors |= {target: source[name].detach() for target, name in block.copies}
        for linear in block.linears:
            weight, bias = (t.detach() for t in gather(linear, source))
            if recipe is None:
                made = {"weight": weight, "bias": bias}
            else:
                made = quantize_planned(linear, weight, bias, recipe, weight.dtype).tensors()
            tensors |= {f"{linear.name}.{field}": tensor for field, tensor in made.items()}
    return tensors
