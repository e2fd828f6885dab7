"""Opening a 4-bit FLUX checkpoint of any container: native folder, Nunchaku's folder or file, Diffusers' own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tonfa.checkpoint import files, native
from tonfa.checkpoint.deviations import LAYERS, with_deviations
from tonfa.checkpoint.reading import exists, local_path, parse_object, present, read_json
from tonfa.checkpoint.strict import Spec
from tonfa.checkpoint.tensors import TensorFiles, TensorFolder
from tonfa.errors import CheckpointError
from tonfa.formats import GROUP_SIZE
from tonfa.models.flux.lite import METHOD, LiteTensors, find_deviations, is_lite, parse_config
from tonfa.models.flux.nunchaku import NunchakuTensors, branch_rank
from tonfa.models.flux.plan import flux_dims, flux_plan

LEGACY_FILES = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
_SINGLE_FILE = (".safetensors", ".sft")
_METHOD, _PRECISION = "svdquant", "int4"


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers are read: the configuration, and the tensors once the model's shapes are known."""

    where: str
    config: Mapping[str, Any]
    tensors: Callable[[Spec], native.Source]
    """From the spec of the model's state dict to the tensors by native name."""


def is_single_file(source: str | Path) -> bool:
    """Whether this names a file, here or on the Hub, rather than a folder."""
    local = local_path(source)
    if exists(local) and local.is_dir():
        return False
    return str(source).endswith(_SINGLE_FILE) or (exists(local) and local.is_file())


def open_checkpoint(source: str | Path, **hub: Any) -> Opened:
    """A local file or folder, a Hub id `org/name`, or a file of a Hub repository `org/name/file.safetensors`.

    `hub` holds `subfolder`, `revision`, `token`, `cache_dir` and `local_files_only`. Raises CheckpointError, naming the
    file, for whatever is no 4-bit FLUX checkpoint.
    """
    if is_single_file(source):
        return _single_file(files.resolve_file(source, **hub))
    folder = files.resolve(source, **hub)
    if any(present(folder / name) for name in LEGACY_FILES):
        return _legacy_folder(folder)
    config = read_json(folder / native.CONFIG)
    if is_lite(config):
        return _lite_folder(folder, config)
    native.check_config(config, str(folder / native.CONFIG))
    return Opened(str(folder), config, lambda _: TensorFolder(folder))


def _single_file(path: Path) -> Opened:
    source = TensorFiles([path])
    metadata = source.metadata()
    if "config" not in metadata:
        raise CheckpointError(f"{path}: has no 'config' in its metadata; expected a Nunchaku single-file checkpoint")
    quantization = parse_object(
        metadata.get("quantization_config", "{}"), f"{path}: quantization_config in the metadata"
    )
    _check_quantization(quantization, branch_rank(source.spec(), str(path)), str(path))
    return _nunchaku(source, parse_object(metadata["config"], f"{path}: config in the metadata"), str(path))


def _legacy_folder(folder: Path) -> Opened:
    return _nunchaku(TensorFiles(folder / n for n in LEGACY_FILES), read_json(folder / "config.json"), str(folder))


def _lite_folder(folder: Path, config: Mapping[str, Any]) -> Opened:
    where = str(folder / native.CONFIG)
    plan = flux_plan(flux_dims(config, where))
    lite = parse_config(config, plan, where)
    source = TensorFolder(folder)
    layers = find_deviations(source, plan, lite, str(folder))
    made = {**native.quantization_config(lite.rank, {"name": METHOD}), LAYERS: layers}

    def tensors(expected: Spec) -> native.Source:
        return LiteTensors(source, with_deviations(plan, layers, str(folder)), lite, expected, str(folder))

    return Opened(str(folder), {**config, "quantization_config": made}, tensors)


def _check_quantization(quantization: Mapping[str, Any], rank: int, where: str) -> None:
    """Early files lack keys, so each may be missing, but none may contradict what the tensors are taken for."""
    weight = quantization.get("weight")
    if weight is not None and not isinstance(weight, Mapping):
        raise CheckpointError(f"{where}: weight in quantization_config is {weight!r}, expected an object")
    precision, group_size = ((weight or {}).get(key) for key in ("dtype", "group_size"))
    if precision not in (None, _PRECISION):
        raise CheckpointError(f"{where}: weights are {precision!r}; take the INT4 checkpoint (svdq-int4)")
    facts = {"method": _METHOD, "rank": rank, "group_size": GROUP_SIZE}
    for key, found in {**quantization, "group_size": group_size}.items():
        if key in facts and found is not None and found != facts[key]:
            raise CheckpointError(f"{where}: {key} in quantization_config is {found!r}, expected {facts[key]!r}")


def _nunchaku(source: TensorFiles, config: Mapping[str, Any], where: str) -> Opened:
    made = native.quantization_config(branch_rank(source.spec(), where), {"name": "nunchaku"})

    def tensors(expected: Spec) -> native.Source:
        return NunchakuTensors(source, flux_dims(config), expected, where)

    return Opened(where, {**config, "quantization_config": made}, tensors)
