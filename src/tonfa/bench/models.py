"""The models that benchmarks name: FLUX at full size and the demo's with random weights, or a folder with its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

from tonfa.bench.synthetic import DEMO, FULL, quantized_model
from tonfa.checkpoint.reading import read_json
from tonfa.errors import CheckpointError, UnsupportedError
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


def configuration(name: str, blocks: tuple[int, int] | None = None) -> dict[str, Any]:
    """The architecture of the model of this name, for random weights; with so many double and single blocks."""
    if name in SYNTHETIC:
        found = dict(SYNTHETIC[name])
    else:
        stored = read_json(transformer_folder(name) / "config.json")
        found = {key: stored.get(key, default) for key, default in FULL.items()}
        found |= {key: tuple(stored[key]) for key in ("axes_dims_rope",) if key in stored}
    if blocks is not None:
        found |= {"num_layers": blocks[0], "num_single_layers": blocks[1]}
    return found


def four_bit_model(
    name: str, rank: int, device: torch.device, seed: int, blocks: tuple[int, int] | None = None
) -> SVDQFluxTransformer2DModel:
    """The 4-bit model of this name in bf16: random weights, a 4-bit checkpoint, or a 16-bit one quantized now."""
    if name in SYNTHETIC:
        return quantized_model(configuration(name, blocks), rank, device, seed)
    if blocks is not None:
        raise UnsupportedError(f"--blocks: a model with its own weights has all of its blocks, --model {name} is one")
    folder = transformer_folder(name)
    if read_json(folder / "config.json").get("quantization_config") is not None:
        return SVDQFluxTransformer2DModel.from_pretrained(folder, device=device, dtype=torch.bfloat16)
    dense = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).to(device)
    return SVDQFluxTransformer2DModel.from_dense(dense, Recipe(rank=rank))
