"""Saving and loading any quantized model: a folder with safetensors and a config.json that lists its 4-bit linears.

`quantization_config.linears` has an entry a linear: kind, in_features, out_features and, for `svdq`, rank and unsigned.
With it the skeleton is made again: the dense model with 4-bit layers in the places of those linears. Tensors have the
names of the model's state dict; those of a 4-bit linear are the native checkpoint's (docs/checkpoint.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tonfa.checkpoint import native
from tonfa.checkpoint.shards import DEFAULT_SHARD_SIZE
from tonfa.checkpoint.strict import Spec, check
from tonfa.checkpoint.tensors import TensorFolder
from tonfa.checkpoint.values import check_values
from tonfa.dispatch import usable_device
from tonfa.errors import CheckpointError, UnsupportedError
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import W4A16Linear
from tonfa.models.generic.plan import linears_of, reason_against
from tonfa.models.generic.quantize import Model, QuantizedLayer, replace_linears, set_activations
from tonfa.plan import LinearPlan
from tonfa.quantizer.planned import planned_spec

LINEARS = "linears"


def quantized_linears(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The entries of a model's 4-bit linears, as config.json holds them."""
    entries: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SVDQLinear):
            entries[name] = {"kind": "svdq", "rank": layer.rank, "unsigned": layer.unsigned}
        elif isinstance(layer, W4A16Linear):
            entries[name] = {"kind": "w4a16"}
        else:
            continue
        entries[name] |= {"in_features": layer.in_features, "out_features": layer.out_features}
    return entries


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Write a model that `quantize` made, whole or not at all. A Diffusers model's configuration is kept too.

    Raises UnsupportedError for a model without 4-bit linears, CheckpointError for a folder that is taken.
    """
    entries = quantized_linears(model)
    if not entries:
        raise UnsupportedError(f"{type(model).__name__} has no 4-bit linears; quantize it first")
    described = getattr(model, "to_json_string", None)
    config: dict[str, Any] = json.loads(described()) if callable(described) else {}
    rank = max((entry.get("rank", 1) for entry in entries.values()), default=1)
    quantization = {**native.quantization_config(rank, {}), LINEARS: entries}
    config |= {"_class_name": type(model).__name__, "quantization_config": quantization}
    native.save(Path(folder), config, model.state_dict(), max_shard_size=max_shard_size, overwrite=overwrite)


def load_model(
    model: Model, folder: str | Path, *, device: torch.device | str | int = "cpu", activations: str | None = None
) -> Model:
    """Fill a dense model of the saved one's class and configuration; the model itself is changed, and returned.

    It may have been built under `torch.device("meta")`, which takes no memory, unless it has buffers that no state dict
    holds. Tensors keep the dtypes that were saved. Raises CheckpointError, naming tensor or linear, for a folder that
    does not fit the model; the model is then as it was.
    """
    place, path = usable_device(device), Path(folder)
    config = native.read_config(path)
    entries = _entries(config["quantization_config"], model, str(path / native.CONFIG))
    source, expected = TensorFolder(path), _expected(model, entries)
    check(source.spec(), expected, str(path))
    missing = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in expected]
    if missing:
        raise CheckpointError(f"{path}: does not hold {', '.join(missing)}; build the model outside of the meta device")
    tensors = {}
    for name in expected:
        tensors[name] = source.read(name, place)
        check_values(name, tensors[name], str(path))
    replace_linears(model, {entry.name: _empty(entry) for entry in entries})
    model.load_state_dict(tensors, strict=True, assign=True)
    return set_activations(model, activations)


def _entries(config: Mapping[str, Any], model: nn.Module, where: str) -> list[LinearPlan]:
    """The saved linears, compared with those of the model."""
    listed = config.get(LINEARS)
    if not isinstance(listed, Mapping) or not listed:
        raise CheckpointError(f"{where}: quantization_config lists no {LINEARS}; save_model writes them")
    linears = linears_of(model)
    plans = []
    for name, entry in listed.items():
        if name not in linears:
            raise CheckpointError(f"{where}: {name} is no torch.nn.Linear of this {type(model).__name__}")
        found = (linears[name].out_features, linears[name].in_features)
        plan = _entry(name, entry, where)
        if found != (plan.out_features, plan.in_features):
            raise CheckpointError(
                f"{where}: {name} is {plan.out_features} x {plan.in_features}, the model's is {found[0]} x {found[1]}"
            )
        reason = reason_against(linears[name], plan.kind, plan.rank or 0)
        if reason is not None:
            raise CheckpointError(f"{where}: {name}: {reason}")
        plans.append(plan)
    return plans


def _entry(name: str, entry: object, where: str) -> LinearPlan:
    keys = {"kind": str, "in_features": int, "out_features": int}
    if isinstance(entry, Mapping) and entry.get("kind") == "svdq":
        keys |= {"rank": int, "unsigned": bool}
    fits = isinstance(entry, Mapping) and entry.keys() == keys.keys()
    if not fits or not isinstance(entry, Mapping) or any(type(entry[key]) is not kind for key, kind in keys.items()):
        raise CheckpointError(f"{where}: {name} is described by {entry!r}; the configuration is damaged")
    if entry["kind"] not in ("svdq", "w4a16") or entry.get("rank", 1) < 1:
        raise CheckpointError(f"{where}: {name} has kind {entry['kind']!r}, rank {entry.get('rank')}; upgrade tonfa")
    return LinearPlan(
        name,
        (name,),
        entry["out_features"],
        entry["in_features"],
        entry["kind"],
        unsigned=entry.get("unsigned", False),
        rank=entry.get("rank"),
    )


def _expected(model: nn.Module, entries: list[LinearPlan]) -> Spec:
    """Shapes and dtypes of the quantized model's state dict."""
    linears = linears_of(model)
    spec = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    for entry in entries:
        dtype = linears[entry.name].weight.dtype
        del spec[f"{entry.name}.weight"]
        spec.pop(f"{entry.name}.bias", None)
        spec |= planned_spec(entry, entry.rank or 1, dtype)
    return spec


def _empty(entry: LinearPlan) -> QuantizedLayer:
    if entry.kind == "w4a16":
        return W4A16Linear(entry.in_features, entry.out_features, device="meta")
    rank, unsigned = entry.rank or 1, entry.unsigned
    return SVDQLinear(entry.in_features, entry.out_features, rank, unsigned=unsigned, device="meta")
