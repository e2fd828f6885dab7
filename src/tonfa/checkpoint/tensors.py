"""Reading safetensors: one file or the shards of an index as one mapping whose tensors are read when asked for.

Nothing else is read: pickles can run code, and are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tonfa.checkpoint.reading import check_regular, present, read_json
from tonfa.checkpoint.strict import Spec, nbytes
from tonfa.errors import CheckpointError

STEM = "diffusion_pytorch_model"
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Dtypes as the headers of safetensors write them."""

MOST_MAPPED = 2**28
"""Bytes read through one mapping of a file. What was read stays resident with it, so it is renewed now and then."""

_STEMS = (STEM, "model")
_VARIANTS = ("", ".bf16", ".fp16")
_KINDS = {
    b"PK\x03\x04": "a zip archive, probably a pickled PyTorch checkpoint",
    b"\x80\x02": "a pickle",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer instead of the file",
}


def _kind(path: Path) -> str:
    """What an unreadable file is instead, as far as its first bytes tell."""
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    for magic, kind in _KINDS.items():
        if start.startswith(magic):
            return f"is {kind}"
    return "is truncated or damaged"


def open_file(path: Path) -> Any:
    """An open safetensors file: keys(), get_slice(), get_tensor(). Raises CheckpointError if it is none."""
    check_regular(path)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {_kind(path)}; a whole safetensors file is needed ({error})") from error
    except (OSError, MemoryError) as error:  # a file larger than the address space cannot be mapped
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def file_spec(path: Path, handle: Any) -> Spec:
    """Shapes and dtypes of an open file's tensors, from its header."""
    spec = {}
    for name in handle.keys():  # noqa: SIM118, no mapping
        entry = handle.get_slice(name)
        if entry.get_dtype() not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {entry.get_dtype()}, which this version cannot read")
        spec[name] = (tuple(entry.get_shape()), DTYPES[entry.get_dtype()])
    return spec


def _indexed(path: Path) -> dict[str, str]:
    """Tensor names and the names of their files, from an index."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map; the index is damaged")
    for name, file in weight_map.items():
        if not name:
            raise CheckpointError(f"{path}: lists a tensor without a name; the index is damaged")
        if not isinstance(file, str) or not file.endswith(".safetensors") or any(c in file for c in "/\\:"):
            raise CheckpointError(f"{path}: {name} is in {file!r}, which is no safetensors file of this folder")
    return weight_map


def _nothing(folder: Path) -> CheckpointError:
    """Why a folder without a known file cannot be read."""
    if not folder.is_dir():
        return CheckpointError(f"{folder}: no such folder")
    reason = f"{folder}: no {STEM}.safetensors and no index of shards"
    if (folder / "transformer").is_dir():
        return CheckpointError(f"{reason}; this is a whole pipeline, take its subfolder 'transformer'")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.ckpt")):
        return CheckpointError(f"{reason}; pickled weights are not read, save them as safetensors with Diffusers")
    if any(folder.glob("*.safetensors")):
        return CheckpointError(f"{reason}; other layouts than Diffusers' have to be converted first")
    return CheckpointError(reason)


class TensorFiles(Mapping[str, Tensor]):
    """The tensors of some safetensors files, read-only, each read from disk when it is asked for.

    Raises CheckpointError for files that are missing, truncated or no safetensors, or that hold the same tensor.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._mapped = 0
        self._handles: dict[Path, Any] = {}
        self._files: dict[str, Path] = {}
        self._spec: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in paths:
            handle = open_file(path)
            spec = file_spec(path, handle)
            for name in spec.keys() & self._spec.keys():
                raise CheckpointError(f"{path}: {name} stands in {self._files[name].name} too")
            self._handles[path] = handle
            self._files |= dict.fromkeys(spec, path)
            self._spec |= spec

    def __getitem__(self, name: str) -> Tensor:
        path = self._files[name]
        self._mapped += nbytes({name: self._spec[name]})
        if self._mapped > MOST_MAPPED:
            self._mapped = 0
            self._handles[path] = open_file(path)
        try:
            tensor: Tensor = self._handles[path].get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{path}: {name} cannot be read: {error}") from error
        return tensor

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """One tensor on `device`."""
        return self[name].to(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spec)

    def __len__(self) -> int:
        return len(self._spec)

    def spec(self) -> Spec:
        """Shapes and dtypes by name, from the headers."""
        return dict(self._spec)

    def metadata(self) -> dict[str, str]:
        """The metadata of all files."""
        return {key: value for handle in self._handles.values() for key, value in (handle.metadata() or {}).items()}

    def identity(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of each file: equal for unchanged files."""
        stats = ((path.name, path.stat()) for path in sorted(self._handles))
        return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


class TensorFolder(TensorFiles):
    """The tensors of a Diffusers model folder.

    Reads `diffusion_pytorch_model` or `model`, sharded or not, and a .bf16 or .fp16 variant where there is no other.
    Raises CheckpointError, beside the reasons of TensorFiles, for files that contradict their index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = self._index()
        super().__init__(folder / file for file in sorted(set(index.values())))
        if index.keys() != {""}:
            for file in sorted(set(index.values())):
                held = {name for name, path in self._files.items() if path.name == file}
                wrong = held ^ {name for name, listed in index.items() if listed == file}
                if wrong:
                    names = ", ".join(sorted(wrong)[:10])
                    raise CheckpointError(f"{folder / file}: does not agree with its index about {names}")

    def _index(self) -> dict[str, str]:
        """Tensors' files; a file alone stands under the empty name."""
        for stem in _STEMS:
            for variant in _VARIANTS:
                index = self.folder / f"{stem}.safetensors.index{variant}.json"
                single = self.folder / f"{stem}{variant}.safetensors"
                if present(index):
                    return _indexed(index)
                if present(single):
                    return {"": single.name}
        raise _nothing(self.folder)
