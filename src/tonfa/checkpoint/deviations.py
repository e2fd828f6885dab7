"""Linears that are not as the rest of their checkpoint: `layers` in config.json's `quantization_config`.

The rule is one rank for all, q, k and v smoothed alike, shifted unsigned inputs behind a GELU, and 1 added to the
biases of a modulation's scales. Checkpoints of other origin break it; each entry names a linear and what it breaks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tonfa.errors import CheckpointError
from tonfa.plan import LinearPlan, ModelPlan

LAYERS = "layers"
MOST_RANK = 2**14

RANK, PARTS, UNSIGNED, PLUS_ONE = "rank", "parts", "unsigned", "plus_one"


def with_deviations(plan: ModelPlan, layers: object, where: str) -> ModelPlan:
    """The plan as `layers` changes it, None not at all.

    Raises CheckpointError, naming the linear, for one that the plan lacks and for entries that mean nothing there.
    """
    if layers is None:
        return plan
    if not isinstance(layers, Mapping):
        raise CheckpointError(f"{where}: {LAYERS} is {type(layers).__name__}, expected an object")
    unknown = sorted(str(name) for name in layers.keys() - {linear.name for linear in plan.linears()})
    if unknown:
        raise CheckpointError(f"{where}: {LAYERS} names {', '.join(unknown[:10])}, which this model does not have")
    return ModelPlan(
        tuple(
            replace(block, linears=tuple(_changed(linear, layers.get(linear.name), where) for linear in block.linears))
            for block in plan.blocks
        )
    )


def _changed(linear: LinearPlan, entry: object, where: str) -> LinearPlan:
    if entry is None:
        return linear
    what = f"{where}: {LAYERS}: {linear.name}"
    if not isinstance(entry, Mapping):
        raise CheckpointError(f"{what} is {type(entry).__name__}, expected an object")
    change: dict[str, Any] = {}
    for key, value in entry.items():
        if not _means_something(linear, key, value):
            raise CheckpointError(f"{what}: {key} {value!r} means nothing for this linear")
        change[key] = () if key == PLUS_ONE else value
    return replace(linear, **change)


def _means_something(linear: LinearPlan, key: object, value: object) -> bool:
    if key == PLUS_ONE:
        return bool(linear.plus_one) and value is False
    if key == UNSIGNED:
        return linear.unsigned and value is False
    if linear.kind != "svdq" or not isinstance(value, int) or isinstance(value, bool):
        return False
    if key == PARTS:
        return value == len(linear.sources) > 1
    return key == RANK and 1 <= value <= MOST_RANK
