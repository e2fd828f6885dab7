"""Any model, quantized in memory: the linears that a plan names become 4-bit ones, in their places.

Data passes through the model in rounds, because a linear's second moments take K^2 floats: a round gathers as many as
fit in a limit, quantizes the linears that they belong to, and keeps only their 4-bit weights. The dense linears stay in
the model to the end, so that every input is the full-precision one and a failure leaves the model as it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from tonfa.errors import FormatError, UnsupportedError
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import W4A16Linear
from tonfa.models.generic.inputs import Sample, check_samples, gather_moments, shared_inputs
from tonfa.models.generic.plan import Plan, ResolvedPlan, linears_of, resolve, with_shared
from tonfa.ops.activation import parse_activations
from tonfa.plan import LinearPlan, ModelPlan
from tonfa.quantizer.modulation import quantize_modulation
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.recipe import Recipe, find_smoothing, quantize_linear

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
QuantizedLayer = SVDQLinear | W4A16Linear
Progress = Callable[[str, int, int], None]
"""Called with a linear's name, the number of finished linears and the number of all."""

MOMENTS_LIMIT = 4 * 2**30
"""Bytes of second moments that are held at once; one input alone may exceed it (FLUX's widest takes 0.6 GB)."""


def quantize(
    model: Model,
    plan: Plan | ModelPlan,
    inputs: Iterable[Sample] | None = None,
    *,
    recipe: Recipe = Recipe(),  # noqa: B008, frozen
    activations: str | None = None,
    moments_limit: int = MOMENTS_LIMIT,
    progress: Progress | None = None,
) -> Model:
    """Replace the linears that a plan names by 4-bit ones; the model itself is changed, and returned.

    `inputs` are calibration samples, each the `(args, kwargs)` of one call of the model, on its device; all are held,
    and run through the model once for each `moments_limit` bytes of moments. None quantizes without data. Scales and
    branches have the dtype of each linear's weight. `activations` is the policy of `set_activations`.

    Raises UnsupportedError for a plan that does not fit the model, FormatError, naming the linear, for sizes that the
    format does not know, for NaN or Inf in a weight or a calibration input, and for linears that no input reaches; the
    model is then as it was.
    """
    if not isinstance(plan, Plan | ModelPlan):
        raise UnsupportedError(f"plan: expected a Plan, got {plan!r}")
    if not isinstance(recipe, Recipe):
        raise UnsupportedError(f"recipe: expected a Recipe, got {recipe!r}")
    if activations is not None:
        parse_activations(activations)
    linears = linears_of(model)
    resolved = _resolved(plan, model, recipe)
    for name, reason in resolved.skipped.items():
        log.warning("%s stays in 16 bits: %s", name, reason)
    samples = None if inputs is None else check_samples(list(inputs))
    entries = _with_detected(plan, resolved.plan, model, samples)
    made: dict[str, QuantizedLayer] = {}
    total = sum(1 for _ in entries.linears())
    for groups in _rounds(_groups(entries), moments_limit if samples is not None else None):
        moments: dict[str, InputMoments] = {}
        leading = [group[0] for group in groups if group[0].kind == "svdq"]
        if samples is not None and leading:
            read = {entry.name: linears[entry.name] for entry in leading}
            moments = gather_moments(model, read, samples, {e.name for e in leading if e.unsigned})
        for group in groups:
            for entry, layer in _quantized(group, linears, recipe, moments.pop(group[0].name, None), activations):
                made[entry.name] = layer
                if progress is not None:
                    progress(entry.name, len(made), total)
    replace_linears(model, made)
    return model


def set_activations(model: Model, activations: str | None, backend: str | None = None) -> Model:
    """Choose how the 4-bit linears of any model quantize their inputs ("int4", "int8", "fp8", "none"), and the backend.

    None takes the default of the device that a linear is on. Returns the model.
    """
    for layer in model.modules():
        if isinstance(layer, SVDQLinear):
            layer.set_activations(activations, backend)
    return model


def replace_linears(model: nn.Module, made: dict[str, QuantizedLayer]) -> None:
    """Put layers in the places of the linears of these names, also where such a linear has a second name."""
    linears = linears_of(model)
    by_identity = {id(linears[name]): layer for name, layer in made.items()}
    for module in list(model.modules()):
        for child, old in list(module._modules.items()):
            layer = by_identity.get(id(old))
            if layer is not None:
                setattr(module, child, layer.train(module.training))


def _resolved(plan: Plan | ModelPlan, model: nn.Module, recipe: Recipe) -> ResolvedPlan:
    """A `ModelPlan` has to name linears of the model, one by one."""
    if isinstance(plan, Plan):
        return resolve(plan, model, recipe.rank)
    linears = linears_of(model)
    for entry in plan.linears():
        if entry.sources != (entry.name,) or entry.columns is not None or entry.plus_one or entry.parts != 1:
            raise UnsupportedError(
                f"{entry.name}: its plan stacks or cuts dense linears, so it belongs to a model of its own kind; "
                "FLUX's is made by SVDQFluxTransformer2DModel.from_dense or `tonfa quantize`"
            )
        if entry.name not in linears:
            raise UnsupportedError(f"{entry.name}: the model has no torch.nn.Linear of this name")
        found = (linears[entry.name].out_features, linears[entry.name].in_features)
        if found != (entry.out_features, entry.in_features):
            raise FormatError(f"{entry.name}: is {found[0]} x {found[1]}, not as its plan says")
    return ResolvedPlan(plan)


def _with_detected(
    plan: Plan | ModelPlan, resolved: ModelPlan, model: nn.Module, samples: Sequence[Sample] | None
) -> ModelPlan:
    """The plan with the shared inputs that the first sample shows."""
    if samples is None or not isinstance(plan, Plan) or not plan.detect_shared:
        return resolved
    linears = linears_of(model)
    entries = {e.name: e for e in resolved.linears() if e.kind == "svdq"}
    found = shared_inputs(model, {name: linears[name] for name in entries}, samples[0])
    for entry in entries.values():
        named = entry.shares_input
        if named is not None and found.get(entry.name, entry.name) != found.get(named, named):
            raise FormatError(f"{entry.name}: does not read the input of {named}, as the plan says")
    alike = {f: lead for f, lead in found.items() if entries[f].unsigned == entries[lead].unsigned}
    return with_shared(resolved, alike)


def _groups(plan: ModelPlan) -> list[tuple[LinearPlan, ...]]:
    """Linears that share an input, the first of them first."""
    groups: dict[str, list[LinearPlan]] = {}
    for entry in plan.linears():
        groups.setdefault(entry.shares_input or entry.name, []).append(entry)
    return [tuple(group) for group in groups.values()]


def _rounds(groups: Sequence[tuple[LinearPlan, ...]], limit: int | None) -> Iterator[list[tuple[LinearPlan, ...]]]:
    """Neighboring groups whose moments fit in `limit` bytes together; without a limit, all at once."""
    taken: list[tuple[LinearPlan, ...]] = []
    size = 0
    for group in groups:
        needed = 4 * group[0].in_features ** 2 if group[0].kind == "svdq" else 0
        if taken and limit is not None and size + needed > limit:
            yield taken
            taken, size = [], 0
        taken.append(group)
        size += needed
    yield taken


def _quantized(
    group: Sequence[LinearPlan],
    linears: dict[str, nn.Linear],
    recipe: Recipe,
    moments: InputMoments | None,
    activations: str | None,
) -> Iterator[tuple[LinearPlan, QuantizedLayer]]:
    """The linears of one input, with one smoothing factor."""
    dense = [linears[entry.name] for entry in group]
    smooth: Tensor | None = None
    if len(group) > 1:
        weights = [linear.weight.detach() for linear in dense]
        smooth = find_smoothing(weights, moments, recipe, unsigned=group[0].unsigned, dtype=weights[0].dtype)
    for entry, linear in zip(group, dense, strict=True):
        yield entry, _layer(entry, linear, recipe, moments, smooth, activations)


def _layer(
    entry: LinearPlan,
    linear: nn.Linear,
    recipe: Recipe,
    moments: InputMoments | None,
    smooth: Tensor | None,
    activations: str | None,
) -> QuantizedLayer:
    weight, bias = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
    if entry.kind == "w4a16":
        modulation = W4A16Linear(entry.in_features, entry.out_features, device="meta", dtype=weight.dtype)
        modulation.load_state_dict(quantize_modulation(weight, bias, name=entry.name).tensors(), assign=True)
        return modulation
    own = recipe if entry.rank is None else replace(recipe, rank=entry.rank)
    with torch.no_grad():
        weights = quantize_linear(
            weight, bias, own, moments=moments, smooth_factor=smooth, unsigned=entry.unsigned, name=entry.name
        )
    return SVDQLinear.from_weights(weights, activations=activations)
