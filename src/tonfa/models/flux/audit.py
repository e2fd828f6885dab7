"""What a FLUX checkpoint holds, and whether it is sound: the facts behind `tonfa inspect` and `tonfa verify`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tonfa.checkpoint import native
from tonfa.checkpoint.reading import exists, present, read_json
from tonfa.checkpoint.strict import Spec, check, dtype_name, nbytes
from tonfa.checkpoint.tensors import TensorFiles, TensorFolder
from tonfa.checkpoint.values import flaws
from tonfa.formats import GROUP_SIZE, INT4
from tonfa.models.flux.checkpoints import LEGACY_FILES
from tonfa.models.flux.export import QuantizedFlux, read_quantized
from tonfa.models.flux.lite import LiteTensors
from tonfa.models.flux.nunchaku import NunchakuTensors
from tonfa.models.flux.plan import DENSE_CLASS
from tonfa.quantizer.planned import dense_spec, gather, part_names, relative_error

LARGEST_ERROR = 0.5
"""4-bit weights with a low-rank branch are within about 0.15 of their dense ones; more than this is another model."""

_KINDS = {
    "qweight": "codes",
    "wscales": "scales",
    "lora_down": "low_rank",
    "lora_up": "low_rank",
    "proj_down": "low_rank",
    "proj_up": "low_rank",
    "smooth": "smoothing",
    "smooth_orig": "smoothing",
    "smooth_factor": "smoothing",
    "smooth_factor_orig": "smoothing",
    "bias": "biases",
}
_SMOOTHING = (("smooth", "smooth_orig"), ("smooth_factor", "smooth_factor_orig"))


def is_dense(path: Path) -> bool:
    """Whether the folder holds a 16-bit Diffusers FLUX transformer."""
    file = path / native.CONFIG
    if not exists(file) or any(present(path / name) for name in LEGACY_FILES):
        return False
    config = read_json(file)
    return config.get("_class_name") == DENSE_CLASS and config.get("quantization_config") is None


def inspect_checkpoint(path: Path) -> dict[str, Any]:
    """Container, architecture, formats, counts and bytes by kind, oddities. Reads headers and small tensors alone."""
    if is_dense(path):
        folder = TensorFolder(path)
        return _facts("diffusers", path, None, read_json(path / native.CONFIG), folder.spec())
    model = read_quantized(path)
    container, dialect, stored = _stored(model)
    facts = _facts(container, path, dialect, model.config, stored.spec())
    quantization = model.config["quantization_config"]
    facts |= {name: quantization[name] for name in ("precision", "rank", "group_size")}
    facts["oddities"] = list(_oddities(model, stored))
    return facts


def _stored(model: QuantizedFlux) -> tuple[str, str, TensorFiles]:
    """Container, dialect, and the tensors as the files have them."""
    where = Path(model.where)
    if isinstance(model.source, LiteTensors):
        return "nunchaku-lite", "diffusers", TensorFolder(where)
    if not isinstance(model.source, NunchakuTensors):
        return "native", "native", TensorFolder(where)
    if where.is_file():
        return "nunchaku", model.source.dialect, TensorFiles([where])
    return "nunchaku-folder", model.source.dialect, TensorFiles(where / name for name in LEGACY_FILES)


def _facts(container: str, path: Path, dialect: str | None, config: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    floats = sorted({dtype_name(dtype) for _, dtype in spec.values() if dtype.is_floating_point})
    kinds: dict[str, dict[str, int]] = {}
    for name in spec:
        entry = kinds.setdefault(_kind(name, spec), {"tensors": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["bytes"] += nbytes({name: spec[name]})
    architecture = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    return {
        "path": str(path),
        "container": container,
        "dialect": dialect,
        "architecture": architecture,
        "precision": None,
        "rank": None,
        "group_size": None,
        "dtype": ", ".join(floats),
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["bytes"])),
        "tensors": len(spec),
        "bytes": nbytes(spec),
        "oddities": [],
    }


def _kind(name: str, spec: Spec) -> str:
    module, _, field = name.rpartition(".")
    if f"{module}.wzeros" in spec:
        return "modulations"
    return _KINDS.get(field, "dense") if f"{module}.qweight" in spec else "dense"


def _oddities(model: QuantizedFlux, stored: TensorFiles) -> Iterator[dict[str, Any]]:
    """What is legal but not usual: `what`, `count`, and the names of all concerned."""
    spec = stored.spec()
    pairs = [
        (name, f"{name.removesuffix(used)}{unused}")
        for used, unused in _SMOOTHING
        for name in spec
        if name.endswith(f".{used}") and f"{name.removesuffix(used)}{unused}" in spec
    ]
    linears = list(model.plan.linears())
    rows = {f"{linear.name}.wscales": linear.in_features // GROUP_SIZE for linear in linears if linear.kind == "w4a16"}
    found = {
        "smoothing that is unused differs from the one in use": [
            unused for used, unused in pairs if not torch.equal(stored[used], stored[unused])
        ],
        "smoothing is all ones": [
            name for name in model.spec if name.endswith(".smooth_factor") and bool((model.source[name] == 1).all())
        ],
        "negative scales": [
            name for name in model.spec if name.endswith(".wscales") and bool((model.source[name] < 0).any())
        ],
        "q, k and v smoothed apart, so quantized three times": [linear.name for linear in linears if linear.parts > 1],
        "padded scales of a modulation": [name for name, count in rows.items() if spec[name][0][0] != count],
    }
    for what, names in found.items():
        if names:
            yield {"what": what, "count": len(names), "tensors": names}


def verify_checkpoint(path: Path, against: Path | None = None) -> dict[str, Any]:
    """Read every tensor; with `against`, compare every linear with the dense weights there, worst first.

    `against` is a Diffusers folder or a safetensors file with Diffusers' names.
    `problems` is empty for a sound checkpoint. Raises CheckpointError if names, shapes or dtypes do not fit at all.
    """
    model = read_quantized(path)
    problems = [
        {"tensor": name, "problem": problem} for name in model.spec for problem in flaws(name, model.source[name])
    ]
    extremes = sum(int((INT4.unpack(model.source[n]) == -8).sum()) for n in _signed_codes(model))
    errors: dict[str, float] = {}
    if against is not None:
        errors = _errors(model, against)
        problems += [
            {"tensor": name, "problem": f"relative error {error:.3g} against the dense weights"}
            for name, error in errors.items()
            if not error <= LARGEST_ERROR
        ]
    return {
        "path": str(path),
        "against": None if against is None else str(against),
        "ok": not problems,
        "tensors": len(model.spec),
        "codes_at_minus_8": extremes,
        "problems": problems,
        "errors": {name: error if math.isfinite(error) else None for name, error in errors.items()},
    }


def _signed_codes(model: QuantizedFlux) -> list[str]:
    linears = (linear for linear in model.plan.linears() if linear.kind == "svdq")
    return [f"{name}.qweight" for linear in linears for name in part_names(linear)]


def _errors(model: QuantizedFlux, against: Path) -> dict[str, float]:
    dense = TensorFiles([against]) if against.is_file() else TensorFolder(against)
    copies = {name: model.spec[target] for block in model.plan.blocks for target, name in block.copies}
    check(dense.spec(), dense_spec(model.plan, copies, model.dtype), str(against))
    errors = {
        linear.name: relative_error(gather(linear, dense)[0], model.linear(linear)) for linear in model.plan.linears()
    }
    return dict(sorted(errors.items(), key=lambda item: (math.isfinite(item[1]), -item[1])))
