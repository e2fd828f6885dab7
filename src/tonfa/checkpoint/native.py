"""The native checkpoint: a Diffusers model folder with 4-bit weights in the canonical layout.

config.json is the Diffusers configuration with a `quantization_config`; the safetensors hold
`<linear>.<field>` for the fields of SVDQWeights and W4A16Weights and the 16-bit tensors under their own names. The
state dict of the quantized model has the same names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tonfa.checkpoint.atomic import new_folder, write_json
from tonfa.checkpoint.reading import read_json
from tonfa.checkpoint.shards import (
    DEFAULT_SHARD_SIZE,
    group_by_size,
    parse_size,
    shard_names,
    write_index,
    write_tensors,
)
from tonfa.checkpoint.strict import Spec, check, check_one_float
from tonfa.checkpoint.tensors import TensorFolder
from tonfa.checkpoint.values import check_values
from tonfa.errors import CheckpointError
from tonfa.formats import GROUP_SIZE
from tonfa.weights import FLOAT_DTYPES

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONFIG = "config.json"
METHOD = "tonfa"
VERSION = 1
PRECISION = "int4"
MODEL_CLASS = "SVDQFluxTransformer2DModel"


def quantization_config(rank: int, recipe: DataclassInstance | Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the weights; `recipe` tells how they were made."""
    made = asdict(recipe) if is_dataclass(recipe) else dict(recipe)
    return {
        "quant_method": METHOD,
        "format_version": VERSION,
        "precision": PRECISION,
        "group_size": GROUP_SIZE,
        "rank": rank,
        "recipe": made,
    }


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError unless the configuration is of a native checkpoint that this version reads."""
    found = config.get("quantization_config")
    if found is None:
        raise CheckpointError(f"{where}: the model is not quantized; run `tonfa quantize` on it first")
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where}: quantization_config is {type(found).__name__}, expected an object")
    method, version, rank = (found.get(key) for key in ("quant_method", "format_version", "rank"))
    if method != METHOD:
        raise CheckpointError(f"{where}: quantized by {method!r}; only {METHOD!r} checkpoints are read here")
    if version != VERSION or isinstance(version, bool):
        raise CheckpointError(f"{where}: format version {version!r}, this tonfa reads {VERSION}; upgrade tonfa")
    for key, expected in (("precision", PRECISION), ("group_size", GROUP_SIZE)):
        if found.get(key) != expected:
            raise CheckpointError(f"{where}: {key} {found.get(key)!r} is not supported, only {expected!r} is")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{where}: rank {rank!r} is no positive integer; the configuration is damaged")


def read_config(folder: Path) -> dict[str, Any]:
    """The checked configuration of a native checkpoint. Raises CheckpointError if the folder holds no such."""
    path = folder / CONFIG
    config = read_json(path)
    check_config(config, str(path))
    return config


def save(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    overwrite: bool = False,
) -> None:
    """Write a native checkpoint, whole or not at all; `config` holds its `quantization_config`.

    A folder that is not empty is replaced only with `overwrite`, and only if it holds nothing but a checkpoint.
    """
    check_config(config, "config")
    limit = parse_size(max_shard_size)
    entries: list[Spec] = [{name: (tuple(t.shape), t.dtype)} for name, t in tensors.items()]
    groups = [[name for i in group for name in entries[i]] for group in group_by_size(entries, limit)]
    shards = dict(zip(shard_names(len(groups)), groups, strict=True))
    with new_folder(folder, overwrite) as target:
        for file, names in shards.items():
            write_tensors(target / file, {name: tensors[name] for name in names})
        write_index(target, {f: {n: (tuple(tensors[n].shape), tensors[n].dtype) for n in g} for f, g in shards.items()})
        write_json(target / CONFIG, config)


class Source(Protocol):
    """Native tensors by name, from whatever container."""

    def spec(self) -> Spec:
        """Shapes and dtypes by name."""
        ...

    def __getitem__(self, name: str, /) -> Tensor:
        """One tensor, read now."""
        ...

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """One tensor, read now, on `device`."""
        ...


def load(
    folder: Path, expected: Spec, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The tensors of a native folder: see `read`."""
    return read(TensorFolder(folder), expected, str(folder), device=device, dtype=dtype)


def read(
    source: Source,
    expected: Spec,
    where: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The tensors of a checkpoint on `device`, floats cast to `dtype` if given, read one at a time.

    Before anything is read, names, shapes and dtypes are compared with `expected`. bfloat16, float16 and float32
    stand for each other, but one checkpoint has one of them. `where` names the checkpoint in errors.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{where}: cannot be loaded as {dtype}; choose bfloat16, float16 or float32")
    found = source.spec()
    check(found, expected, where)
    check_one_float(found, where)
    # All memory that stays is taken first: taken in turn with what unpacking needs for a moment, it left holes of
    # 4 GiB in the heap over a FLUX transformer.
    loaded = {
        name: torch.empty(shape, dtype=dtype if dtype and kept.is_floating_point else kept, device=device)
        for name, (shape, kept) in ((name, found[name]) for name in expected)
    }
    for name, tensor in loaded.items():
        tensor.copy_(source.read(name, device))
        check_values(name, tensor, where)
    return loaded
