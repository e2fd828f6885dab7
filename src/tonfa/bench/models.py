"""The models that benchmarks name: FLUX at full size and the demo's with random weights, or a folder with its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from tonfa.bench.synthetic import DEMO, FULL, quantized_model
from tonfa.checkpoint.reading import read_json
from tonfa.errors import CheckpointError
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.quantizer.recipe import Recipe

SYNTHETIC: dict[str, dict[str, Any]] = {"full": FULL, "demo": DEMO}
_CLASSES = ("FluxTransformer2DModel", "SVDQFluxTransformer2DModel")


def transformer_folder(name: str) -> Path:
    """A transformer's folder: the one in a pipeline's, or itself. Raises CheckpointError where there is none."""
    folder = Path(name).expanduser()
    inner = folder / "transformer"
    folder = inner if inner.is_dir() else folder
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"--model {name}: neither {', '.join(SYNTHETIC)} nor a folder with a FLUX transformer")
    found = read_json(folder / "config.json").get("_class_name")
    if found not in _CLASSES:
        raise CheckpointError(f"--model {name}: the model is of class {found}, expected {_CLASSES[0]}")
    return folder


def configuration(name: str) -> dict[str, Any]:
    """The architecture of the model of this name, for random weights."""
    if name in SYNTHETIC:
        return SYNTHETIC[name]
    stored = read_json(transformer_folder(name) / "config.json")
    return {key: stored.get(key, default) for key, default in FULL.items()} | {
        key: tuple(stored[key]) for key in ("axes_dims_rope",) if key in stored
    }


def four_bit_model(name: str, rank: int, device: torch.device, seed: int) -> SVDQFluxTransformer2DModel:
    """The 4-bit model of this name in bf16: random weights, a 4-bit checkpoint, or a 16-bit one quantized now."""
    if name in SYNTHETIC:
        return quantized_model(SYNTHETIC[name], rank, device, seed)
    folder = transformer_folder(name)
    if read_json(folder / "config.json").get("quantization_config") is not None:
        return SVDQFluxTransformer2DModel.from_pretrained(folder, device=device, dtype=torch.bfloat16)
    dense = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device)
    return SVDQFluxTransformer2DModel.from_dense(dense, Recipe(rank=rank))
