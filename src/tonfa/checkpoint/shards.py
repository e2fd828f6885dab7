"""Writing safetensors: one file or shards with an index, each written whole or not at all.

The file is written here rather than by the safetensors package so that one tensor at a time is on the host, disk
errors keep their number, and the bytes are synced before the file gets its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tonfa.checkpoint.atomic import replacing, write_json
from tonfa.checkpoint.strict import Spec, dtype_name, nbytes
from tonfa.checkpoint.tensors import DTYPES, STEM
from tonfa.errors import CheckpointError, UnsupportedError

INDEX = f"{STEM}.safetensors.index.json"
DEFAULT_SHARD_SIZE = 10**9

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 1000, "500MB" or "2GiB". Raises UnsupportedError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", str(size).strip().upper())
    if match is None or match[2] not in _UNITS or not (value := int(float(match[1]) * _UNITS[match[2]])):
        raise UnsupportedError(f"shard size {size!r}: expected a number of bytes such as 1000000000, '500MB' or '2GiB'")
    return value


def group_by_size(specs: Iterable[Spec], limit: int) -> list[list[int]]:
    """Indices of neighboring specs, grouped so that a group exceeds `limit` bytes only if it is one spec alone."""
    groups: list[list[int]] = []
    size = 0
    for i, spec in enumerate(specs):
        size += nbytes(spec)
        if not groups or size > limit:
            groups.append([])
            size = nbytes(spec)
        groups[-1].append(i)
    return groups


def shard_names(count: int) -> list[str]:
    """File names of `count` shards; one alone has the name of a whole model."""
    if count == 1:
        return [f"{STEM}.safetensors"]
    return [f"{STEM}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None, spec: Spec | None = None
) -> None:
    """Write one safetensors file, the tensors in order of falling alignment so that each starts aligned.

    `metadata` is added to the header. With a `spec`, each tensor is asked for once, when it is written, so that
    `tensors` may make them then.
    """
    if spec is None:
        spec = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    names = sorted(spec, key=lambda name: (-spec[name][1].itemsize, name))
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        shape, dtype = spec[name]
        if dtype not in _NAMES:
            raise CheckpointError(f"{path}: {name}: {dtype_name(dtype)} cannot be written as safetensors")
        start, end = end, end + nbytes({name: spec[name]})
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name]
            if (tuple(tensor.shape), tensor.dtype) != spec[name]:
                raise CheckpointError(f"{path}: {name}: {dtype_name(tensor.dtype)} {tuple(tensor.shape)} was made")
            flat = tensor.detach().cpu().contiguous().flatten()
            file.write(flat.view(torch.uint8).numpy().data)


def write_index(folder: Path, shards: Mapping[str, Spec]) -> None:
    """Write the index of a folder's shards, unless one file holds the whole model."""
    if len(shards) == 1:
        return
    weight_map = {name: file for file, spec in shards.items() for name in spec}
    total = sum(nbytes(spec) for spec in shards.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
