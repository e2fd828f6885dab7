"""Damaging small checkpoints at random, reproducibly: every way in which a folder of weights has been seen to be wrong.

`damaged_copy(rng, source, target)` changes one thing of a copy and says what an error about it has to name.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flux_models import dense_model

from tonfa import SVDQFluxTransformer2DModel
from tonfa.models.flux.export import export, read_quantized
from tonfa.quantizer.recipe import Recipe

CONTAINERS = ("native", "sharded", "legacy", "single")
INDEX = "diffusion_pytorch_model.safetensors.index.json"
COUNTS = (
    "patch_size",
    "in_channels",
    "num_layers",
    "num_single_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "pooled_projection_dim",
)
NO_COUNTS = (True, 1.0, 1.5, float("nan"), float("inf"), -1, 10**9, 2**63, 10**30, "1", None, [], [1], {})
NO_AXES = (
    None,
    5,
    "abc",
    [],
    [62],
    [8, 28, 27],
    [7, 29, 28],
    [-8, 36, 36],
    [8.0, 28, 28],
    ["8", 28, 28],
    [8, [28], 28],
)
NO_FILES = (
    "../other.safetensors",
    "/etc/other.safetensors",
    "sub/other.safetensors",
    "..\\other.safetensors",
    "other.safetensors",
    "nul\0.safetensors",
    "\ud800.safetensors",
    "\x1b[31m\n.safetensors",
    "a" * 5000 + ".safetensors",
    "config.json",
    "",
    None,
    7,
    True,
    [],
    {},
)


@dataclass(frozen=True)
class Damage:
    """What was done. `refused` says that it may not load; then the error has to hold each of `named`."""

    what: str
    refused: bool
    named: tuple[str, ...] = ()


def make_checkpoints(folder: Path) -> dict[str, Path]:
    """One double and one single block of 64 channels in every container: 0.4 to 0.5 MB each."""
    overrides = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    dense = dense_model(dtype=torch.bfloat16, **overrides)
    model = SVDQFluxTransformer2DModel.from_dense(dense, Recipe(rank=16, iterations=0))
    paths = {name: folder / name for name in CONTAINERS[:3]} | {"single": folder / "single.safetensors"}
    model.save_pretrained(paths["native"])
    model.save_pretrained(paths["sharded"], max_shard_size=100_000)
    opened = read_quantized(paths["native"])
    export(opened, paths["legacy"], "nunchaku-folder")
    export(opened, paths["single"], "nunchaku")
    return paths


def damaged_copy(rng: random.Random, source: Path, target: Path) -> Damage:
    """Copy a checkpoint to `target`, in place of what stands there, with one thing wrong."""
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    if source.is_file():
        return rng.choice(_WEIGHTS)(rng, target)
    weights = rng.choice(sorted(target.glob("*.safetensors")))
    kinds = [(_WEIGHTS, weights), (_CONFIG, target / "config.json")]
    if (target / INDEX).exists():
        kinds.append((_INDEX, target / INDEX))
    ways, path = rng.choice(kinds)
    return rng.choice(ways)(rng, path)


# Bytes of any file


def _truncated(rng: random.Random, path: Path) -> Damage:
    content = path.read_bytes().rstrip()
    length = rng.randrange(len(content))
    path.write_bytes(content[:length])
    return Damage(f"{path.name} cut to {length} bytes", True, (path.name,))


def _flipped(rng: random.Random, path: Path) -> Damage:
    """One to three bytes of a header, or of JSON."""
    content = bytearray(path.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    places = [rng.randrange(end) for _ in range(rng.randint(1, 3))]
    for place in places:
        content[place] = rng.randrange(256)
    path.write_bytes(content)
    return Damage(f"{path.name} with other bytes at {places}", False)


def _extended(rng: random.Random, path: Path) -> Damage:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randint(1, 100)) + b"}")
    return Damage(f"{path.name} with bytes behind its end", True, (path.name,))


def _torch_file(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"proj_out.weight": torch.zeros(4)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _another_kind(rng: random.Random, path: Path) -> Damage:
    kinds: dict[str, Callable[[bytes], bytes]] = {
        "nothing": lambda content: b"",
        "zeros": lambda content: bytes(len(content)),
        "noise": lambda content: rng.randbytes(4096),
        "gzip": gzip.compress,
        "pickle": lambda content: pickle.dumps({"proj_out.weight": [0.0]}),
        "torch zip": lambda content: _torch_file(True),
        "torch pickle": lambda content: _torch_file(False),
        "GGUF": lambda content: b"GGUF" + bytes(1000),
        "LFS pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "web page": lambda content: b"<!DOCTYPE html><html><body>404</body></html>",
        "UTF-16": lambda content: content.decode("latin-1").encode("utf-16"),
        "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
        "deep lists": lambda content: b"[" * 100_000,
        "deep objects": lambda content: b'{"a":' * 100_000,
        "a list": lambda content: b"[]",
        "NaN": lambda content: b"NaN",
        "a long number": lambda content: b'{"num_layers": ' + b"9" * 10_000 + b"}",
    }
    name = rng.choice(sorted(kinds))
    path.write_bytes(kinds[name](path.read_bytes()))
    return Damage(f"{path.name} is {name}", True, (path.name,))


def _socket(path: Path) -> None:
    """Bound by its name within the folder: a socket's whole path has to fit in 108 bytes."""
    before = Path.cwd()
    with socket.socket(socket.AF_UNIX) as made:
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(before)


def _no_file(rng: random.Random, path: Path) -> Damage:
    """Something else under the file's name. Opening a pipe would wait for ever, reading /dev/zero never end."""
    kinds: dict[str, Callable[[], object]] = {
        "missing": lambda: None,
        "a folder": path.mkdir,
        "a pipe": lambda: os.mkfifo(path),
        "a socket": lambda: _socket(path),
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to nothing": lambda: path.symlink_to("../nowhere"),
        "a link to zeros": lambda: path.symlink_to("/dev/zero"),
        "a link to the null device": lambda: path.symlink_to("/dev/null"),
    }
    name = rng.choice(sorted(kinds))
    lost_index = path.name == INDEX and name == "missing"
    path.unlink()
    kinds[name]()
    return Damage(f"{path.name} is {name}", True, () if lost_index else (path.name,))


def _elsewhere(rng: random.Random, path: Path) -> Damage:
    """The Hub's cache is made of links: they are followed."""
    blob = path.with_name("blob")
    path.rename(blob)
    path.symlink_to(blob.name)
    return Damage(f"{path.name} is a link", False)


_BYTES = (_truncated, _flipped, _flipped, _extended, _another_kind, _no_file, _elsewhere)


# Headers and values of safetensors


def _read(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _write(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _tensors(header: dict[str, Any]) -> list[str]:
    """In the order of names. A second smoothing factor, which nothing reads, is left alone."""
    return sorted(n for n in header if n != "__metadata__" and not n.endswith(".smooth_orig"))


def _header_length(rng: random.Random, path: Path) -> Damage:
    content = path.read_bytes()
    true = int.from_bytes(content[:8], "little")
    claimed = rng.choice([0, 1, 7, true - 1, true + 1, true + 8, 2 * true, 10**8, 10**8 + 1, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", claimed) + content[8:])
    return Damage(f"{path.name}: header of {claimed} bytes", True, (path.name,))


def _wrong_dtype(rng: random.Random, path: Path) -> Damage:
    """An unknown dtype or one of another size: the file, or the tensor, is named."""
    header, data = _read(path)
    name = rng.choice(_tensors(header))
    right = header[name]["dtype"]
    kinds = {"F64", "I64", "I16", "F16", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "U64", "bf16", "", 5, None}
    alike = {"U8": {"BOOL"}, "I8": {"BOOL", "U8"}}.get(right, set())
    wrong = rng.choice(sorted(kinds | alike - {right}, key=str))
    header[name]["dtype"] = wrong
    _write(path, header, data)
    return Damage(f"{path.name}: {name} is {right}, marked {wrong!r}", True, (path.parent.name,))


def _wrong_shape(rng: random.Random, path: Path) -> Damage:
    header, data = _read(path)
    name = rng.choice(
        [n for n in _tensors(header) if header[n]["shape"] != header[n]["shape"][::-1]] or _tensors(header)
    )
    shape = header[name]["shape"]
    shapes: list[object] = [[], [0], [0, *shape], [1, *shape], [*shape, 1], [-1], [2**63], [2**32, 2**32], [0, 2**62]]
    shapes += [[1.5], "x", None, [shape], [shape[0] + 1, *shape[1:]]]
    if shape != shape[::-1]:
        shapes += [shape[::-1]] * 3
    header[name]["shape"] = rng.choice(shapes)
    _write(path, header, data)
    return Damage(f"{path.name}: {name} {shape} marked {header[name]['shape']}", True, (path.parent.name,))


def _wrong_offsets(rng: random.Random, path: Path) -> Damage:
    """Overlaps, gaps, ends before starts and beyond the file."""
    header, data = _read(path)
    name, other = rng.sample(_tensors(header), 2)
    start, end = header[name]["data_offsets"]
    wrong = [
        [start + 1, end + 1],
        [start, end - 1],
        [end, start],
        [start, 2**63],
        [2**64, 2**64],
        [0, 0],
        [start],
        None,
    ]
    if header[other]["data_offsets"] != [start, end]:
        wrong.append(header[other]["data_offsets"])
    header[name]["data_offsets"] = rng.choice(wrong)
    _write(path, header, data)
    return Damage(f"{path.name}: {name} at {header[name]['data_offsets']}", True, (path.name,))


def _gap(rng: random.Random, path: Path) -> Damage:
    header, data = _read(path)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    _write(path, header, bytes(8) + data)
    return Damage(f"{path.name}: 8 bytes of no tensor", True, (path.name,))


def _missing_tensor(rng: random.Random, path: Path) -> Damage:
    """Cut out of header and data."""
    header, data = _read(path)
    name = rng.choice(_tensors(header))
    start, end = header.pop(name)["data_offsets"]
    for other in _tensors(header) + [n for n in header if n.endswith(".smooth_orig")]:
        entry = header[other]
        if entry["data_offsets"][0] >= end:
            entry["data_offsets"] = [offset - (end - start) for offset in entry["data_offsets"]]
    _write(path, header, data[:start] + data[end:])
    return Damage(f"{path.name} lacks {name}", True, (name,))


def _renamed_tensor(rng: random.Random, path: Path) -> Damage:
    header, data = _read(path)
    name = rng.choice(_tensors(header))
    wrong = rng.choice(
        [f"{name}2", f"model.{name}", "../../etc/passwd", "\x1b[31mred\x1b[0m", "a\nb", "n" * 10_000, ""]
    )
    header[wrong] = header.pop(name)
    _write(path, header, data)
    return Damage(f"{path.name}: {name} is called {wrong[:20]!r}", True, (name,))


def _swapped_tensors(rng: random.Random, path: Path) -> Damage:
    """Two of different shapes; two of one shape and dtype are both right for all that a file can tell."""
    header, data = _read(path)
    names = _tensors(header)
    first = rng.choice(names)
    second = rng.choice([n for n in names if header[n]["shape"] != header[first]["shape"]])
    header[first], header[second] = header[second], header[first]
    _write(path, header, data)
    return Damage(f"{path.name}: {first} and {second} swapped", True, (path.parent.name,))


def _stated_twice(rng: random.Random, path: Path) -> Damage:
    header, data = _read(path)
    name = rng.choice(_tensors(header))
    again = {**header[name], **rng.choice([{}, {"dtype": "F16"}, {"shape": [1]}, {"data_offsets": [0, 2]}])}
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(again)}}}"
    _write(path, text.encode(), data)
    return Damage(f"{path.name}: {name} twice, the second {again}", False)


def _bad_value(rng: random.Random, path: Path) -> Damage:
    """NaN or Inf anywhere, zero or less to divide by. All of a packed tensor: parts of it may be padding."""
    header, data = _read(path)
    floats = [n for n in _tensors(header) if header[n]["dtype"] == "BF16"]
    smooth = [n for n in floats if n.endswith((".smooth", ".smooth_factor"))]
    nan, inf, zero, less, subnormal = 0x7FC0, 0x7F80, 0x0000, 0xBF80, 0x0001
    name, value = rng.choice(floats), rng.choice([nan, inf, inf | 0x8000, 0x7F81])
    if smooth and rng.random() < 0.4:
        name, value = rng.choice(smooth), rng.choice([zero, 0x8000, less, subnormal])
    start, end = header[name]["data_offsets"]
    changed = bytearray(data)
    changed[start:end] = struct.pack("<H", value) * ((end - start) // 2)
    _write(path, header, bytes(changed))
    block = ".".join(name.split(".")[:2])
    return Damage(f"{path.name}: {name} is {value:#06x}", True, (block, "`tonfa verify`"))


_WEIGHTS = (
    *_BYTES,
    _header_length,
    _wrong_dtype,
    _wrong_shape,
    _wrong_offsets,
    _gap,
    _missing_tensor,
    _renamed_tensor,
    _swapped_tensors,
    _stated_twice,
    _bad_value,
    _bad_value,
)


# JSON


def _edited(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def _no_count(rng: random.Random, path: Path) -> Damage:
    key = rng.choice(COUNTS)
    value = rng.choice(NO_COUNTS if key.endswith("_layers") else (0, *NO_COUNTS))
    _edited(path, lambda config: config.update({key: value}))
    return Damage(f"{key} is {value!r}", True, (key,))


def _another_count(rng: random.Random, path: Path) -> Damage:
    """A possible number that the tensors contradict."""
    key, value = rng.choice(COUNTS), rng.choice([2, 3, 7, 16, 63, 65, 256, 1000])
    same = json.loads(path.read_text())[key] == value
    _edited(path, lambda config: config.update({key: value}))
    return Damage(f"{key} is {value}", not same)


def _no_axes(rng: random.Random, path: Path) -> Damage:
    value = rng.choice(NO_AXES)
    _edited(path, lambda config: config.update(axes_dims_rope=value))
    return Damage(f"axes_dims_rope is {value!r}", True)


def _no_guidance(rng: random.Random, path: Path) -> Damage:
    value = rng.choice([False, "true", "", 1, 0, None, [], 1.5])
    _edited(path, lambda config: config.update(guidance_embeds=value))
    return Damage(f"guidance_embeds is {value!r}", True)


def _another_key(rng: random.Random, path: Path) -> Damage:
    key = rng.choice(["surprise", "", "self", "cls", "dtype", "a\nb\x1b[31m", "\ud800", "num_layers "])
    _edited(path, lambda config: config.update({key: 1}))
    return Damage(f"config.json has {key!r}", True)


def _lost_key(rng: random.Random, path: Path) -> Damage:
    """Diffusers' default counts, which is FLUX's: of this model the patch size alone."""
    key = rng.choice([*COUNTS, "axes_dims_rope", "guidance_embeds"])
    _edited(path, lambda config: config.pop(key))
    return Damage(f"config.json lacks {key}", key != "patch_size")


def _key_twice(rng: random.Random, path: Path) -> Damage:
    key = rng.choice(COUNTS)
    path.write_text(path.read_text().replace("{", f'{{"{key}": 2,', 1))
    return Damage(f"config.json has {key} twice", True, (key, "twice"))


def _wrong_quantization(rng: random.Random, path: Path) -> Damage:
    """In Nunchaku's folder it means nothing: the tensors tell."""
    wrong = {
        "rank": (0, -16, 32, 10**9, 10**30, 16.0, "16", True, None),
        "format_version": (0, 2, "1", True, None),
        "group_size": (128, "64", None),
        "precision": ("fp4", None, ["int4"]),
        "quant_method": ("bitsandbytes", None, 5),
    }
    key = rng.choice(sorted(wrong))
    value = rng.choice(wrong[key])
    native = "quantization_config" in json.loads(path.read_text())
    _edited(path, lambda config: config.setdefault("quantization_config", {}).update({key: value}))
    return Damage(f"{key} is {value!r}", native)


def _wrong_file(rng: random.Random, path: Path) -> Damage:
    file = rng.choice(NO_FILES)
    name = rng.choice(sorted(json.loads(path.read_text())["weight_map"]))
    _edited(path, lambda index: index["weight_map"].update({name: file}))
    return Damage(f"{name} is in {file!r:.40}", True)


def _wrong_map(rng: random.Random, path: Path) -> Damage:
    value = rng.choice([None, [], {}, 5, "x", [["proj_out.weight", "a.safetensors"]]])
    _edited(path, lambda index: index.update(weight_map=value))
    return Damage(f"weight_map is {value!r}", True, (path.name,))


def _wrong_entry(rng: random.Random, path: Path) -> Damage:
    """A tensor that is not listed, not there, or in another shard."""
    weight_map = json.loads(path.read_text())["weight_map"]
    name = rng.choice(sorted(weight_map))
    other = rng.choice(sorted(set(weight_map.values()) - {weight_map[name]}))
    change = rng.choice(["lost", "added", "moved", "nameless"])
    if change == "lost":
        _edited(path, lambda index: index["weight_map"].pop(name))
    else:
        name = {"added": f"{name}.more", "nameless": "", "moved": name}[change]
        _edited(path, lambda index: index["weight_map"].update({name: other}))
    return Damage(f"{name} {change}", True, (name,))


def _other_shards(rng: random.Random, path: Path) -> Damage:
    """One shard under another's name, or everything in one."""
    shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    first, second = rng.sample(shards, 2)
    if rng.random() < 0.5:
        shutil.copyfile(path.with_name(first), path.with_name(second))
    else:
        _edited(path, lambda index: index.update(weight_map=dict.fromkeys(index["weight_map"], first)))
    return Damage(f"{second} is {first}", True)


_CONFIG = (
    *_BYTES,
    _no_count,
    _no_count,
    _another_count,
    _no_axes,
    _no_guidance,
    _another_key,
    _lost_key,
    _key_twice,
    _wrong_quantization,
)
_INDEX = (*_BYTES, _wrong_file, _wrong_file, _wrong_map, _wrong_entry, _wrong_entry, _other_shards)
