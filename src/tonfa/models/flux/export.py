"""Writing a 4-bit FLUX checkpoint in another container: native, Nunchaku's file or folder, Diffusers' 4-bit or dense.

Tensors are read, converted and written one at a time. Nunchaku's and the native forms hold the same numbers; what
changes in Diffusers' 4-bit form is told in `lite_export.py`; the dense weights are what the 4-bit ones stand for,
rounded to the checkpoint's own floating dtype.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tonfa.checkpoint import native
from tonfa.checkpoint.atomic import explained, new_folder, write_json
from tonfa.checkpoint.shards import DEFAULT_SHARD_SIZE, group_by_size, shard_names, write_index, write_tensors
from tonfa.checkpoint.strict import Spec, check, check_one_float
from tonfa.checkpoint.values import check_values
from tonfa.errors import CheckpointError
from tonfa.formats import GROUP_SIZE
from tonfa.models.flux.checkpoints import LEGACY_FILES, open_checkpoint
from tonfa.models.flux.layers import configured_plan
from tonfa.models.flux.lite_export import LiteForm
from tonfa.models.flux.nunchaku import packed_tensors
from tonfa.models.flux.plan import DENSE_CLASS
from tonfa.models.flux.published import PublishedTensors
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.plan import LinearPlan, ModelPlan
from tonfa.quantizer.planned import dense_spec, planned_spec
from tonfa.weights import StackedWeights, SVDQWeights, W4A16Weights

Form = Literal["native", "nunchaku", "nunchaku-folder", "nunchaku-lite", "dense"]

NUNCHAKU_CLASS = "NunchakuFluxTransformer2dModel"

_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_CACHED_LINEARS = 4
"""Dense linears kept while their sources are written: in order of names, q, k and v have `to_out` between them."""


@dataclass(frozen=True)
class QuantizedFlux:
    """A checkpoint whose headers have been found to describe exactly one 4-bit FLUX transformer."""

    where: str
    config: Mapping[str, Any]
    """Arguments of the model: every key of Diffusers' configuration, and `quantization_config`."""
    plan: ModelPlan
    dtype: torch.dtype
    spec: Spec
    source: native.Source

    @property
    def rank(self) -> int:
        """Width of the low-rank branches."""
        return int(self.config["quantization_config"]["rank"])

    def linear(self, linear: LinearPlan) -> SVDQWeights | W4A16Weights | StackedWeights:
        """A planned linear's weights, read now."""
        names = planned_spec(linear, self.rank, self.dtype)
        modules: dict[str, dict[str, Tensor]] = {}
        for name in names:
            module, _, field = name.rpartition(".")
            modules.setdefault(module, {})[field] = self.source[name]
        if linear.kind == "w4a16":
            return W4A16Weights(**modules[linear.name])
        parts = tuple(SVDQWeights(**fields, unsigned=linear.unsigned) for fields in modules.values())
        return parts[0] if linear.parts == 1 else StackedWeights(parts)


def read_quantized(source: str | Path, **hub: Any) -> QuantizedFlux:
    """Open whatever `open_checkpoint` takes and compare its headers with the model.

    Raises CheckpointError, listing names, for tensors that are missing, unexpected, misshapen or of a wrong dtype.
    """
    opened = open_checkpoint(source, **hub)
    model = SVDQFluxTransformer2DModel._on_meta(opened.config, f"{opened.where}: config")
    expected = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    tensors = opened.tensors(expected)
    spec = tensors.spec()
    check(spec, expected, opened.where)
    check_one_float(spec, opened.where)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    dtype = spec["proj_out.weight"][1]
    return QuantizedFlux(opened.where, config, configured_plan(config), dtype, spec, tensors)


def export(model: QuantizedFlux, out: Path, form: Form, *, overwrite: bool = False) -> None:
    """Write the model to `out`, a file for "nunchaku" and a folder otherwise, whole or not at all.

    Raises CheckpointError where something is in the way, where the form cannot hold the model, and for NaN, Inf and
    smoothing factors that cannot be divided by.
    """
    model = replace(model, source=_Sound(model))
    if form == "nunchaku":
        _write_file(model, out, overwrite)
        return
    with new_folder(out, overwrite) as folder:
        if form == "native":
            config = {"_class_name": native.MODEL_CLASS, **model.config}
            native.check_config(config, "config")
            _write_shards(folder, _native(model), config)
        elif form == "dense":
            _write_shards(folder, _dense(model), _diffusers_config(model))
        elif form == "nunchaku-lite":
            lite = LiteForm(model)
            config = {**_diffusers_config(model), "quantization_config": lite.quantization_config}
            _write_shards(folder, _Tensors(lite.spec, lite.__getitem__), config)
        else:
            _write_legacy(model, folder)


class _Sound:
    """A model's native tensors, their values checked as they are read."""

    def __init__(self, model: QuantizedFlux) -> None:
        self._model = model

    def spec(self) -> Spec:
        return self._model.spec

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, "cpu")

    def read(self, name: str, device: torch.device | str) -> Tensor:
        tensor = self._model.source.read(name, device)
        check_values(name, tensor, self._model.where)
        return tensor


class _Tensors(Mapping[str, Tensor]):
    """Tensors whose shapes are known and that are made when asked for."""

    def __init__(self, spec: Spec, make: Callable[[str], Tensor]) -> None:
        self.spec = spec
        self._make = make

    def __getitem__(self, name: str) -> Tensor:
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spec)

    def __len__(self) -> int:
        return len(self.spec)

    def some(self, names: list[str]) -> _Tensors:
        return _Tensors({name: self.spec[name] for name in names}, self._make)


def _write_shards(folder: Path, tensors: _Tensors, config: Mapping[str, Any]) -> None:
    names = list(tensors)
    groups = group_by_size(({name: tensors.spec[name]} for name in names), DEFAULT_SHARD_SIZE)
    shards = {
        file: tensors.some([names[i] for i in group])
        for file, group in zip(shard_names(len(groups)), groups, strict=True)
    }
    for file, shard in shards.items():
        write_tensors(folder / file, shard, spec=shard.spec)
    write_index(folder, {file: shard.spec for file, shard in shards.items()})
    write_json(folder / native.CONFIG, config)


def _native(model: QuantizedFlux) -> _Tensors:
    return _Tensors(model.spec, model.source.__getitem__)


def _write_file(model: QuantizedFlux, out: Path, overwrite: bool) -> None:
    if out.suffix != ".safetensors":
        raise CheckpointError(f"{out}: Nunchaku knows a single file by its name; let it end with .safetensors")
    if out.is_dir():
        raise CheckpointError(f"{out}: is a folder; name a file to write to")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out}: exists; choose another name or ask to overwrite it")
    tensors, rank = _nunchaku(model)
    metadata = {
        "config": json.dumps(_diffusers_config(model)),
        "comfy_config": json.dumps(comfy_config(model)),
        "model_class": NUNCHAKU_CLASS,
        "quantization_config": json.dumps(_nunchaku_quantization(rank)),
    }
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(out, tensors, metadata=metadata, spec=tensors.spec)


def _write_legacy(model: QuantizedFlux, folder: Path) -> None:
    tensors, _ = _nunchaku(model)
    inner = [name for name in tensors if name.startswith(_BLOCKS)]
    outer = [name for name in tensors if not name.startswith(_BLOCKS)]
    for file, names in zip(LEGACY_FILES, (inner, outer), strict=True):
        part = tensors.some(names)
        write_tensors(folder / file, part, spec=part.spec)
    write_json(folder / native.CONFIG, _diffusers_config(model))
    write_json(folder / "comfy_config.json", comfy_config(model))


def _nunchaku(model: QuantizedFlux) -> tuple[_Tensors, int]:
    """The packed tensors under v1 names, and their rank.

    `smooth_orig`, which no engine uses but one wants, is `smooth` again.
    """
    published = PublishedTensors(model)
    packed = packed_tensors(published.plan, published.rank, model.dtype, "v1", model.spec)
    places = {tensor.name: (name, tensor) for name, tensor in packed.items()}
    for name, tensor in packed.items():
        if name.endswith(".smooth_factor"):
            places[f"{tensor.name}_orig"] = (name, tensor)

    def make(name: str) -> Tensor:
        native_name, tensor = places[name]
        return tensor.pack(published[native_name])

    return _Tensors({name: (tensor.shape, tensor.dtype) for name, (_, tensor) in places.items()}, make), published.rank


def _nunchaku_quantization(rank: int) -> dict[str, Any]:
    int4 = {"dtype": "int4", "scale_dtype": None, "group_size": GROUP_SIZE}
    return {"method": "svdquant", "weight": int4, "activation": int4, "rank": rank}


def _diffusers_config(model: QuantizedFlux) -> dict[str, Any]:
    arguments = {name: value for name, value in model.config.items() if name != "quantization_config"}
    return {"_class_name": DENSE_CLASS, **arguments}


def comfy_config(model: QuantizedFlux) -> dict[str, Any]:
    """What ComfyUI-nunchaku reads: ComfyUI's names, and channels counted before 2 x 2 pixels make a token."""
    config = model.config
    channels, heads = config["in_channels"], config["num_attention_heads"]
    guidance = bool(config["guidance_embeds"])
    return {
        "model_class": "Flux" if guidance else "FluxSchnell",
        "model_config": {
            "axes_dim": list(config["axes_dims_rope"]),
            "context_in_dim": config["joint_attention_dim"],
            "depth": config["num_layers"],
            "depth_single_blocks": config["num_single_layers"],
            "disable_unet_model_creation": True,
            "guidance_embed": guidance,
            "hidden_size": heads * config["attention_head_dim"],
            "image_model": "flux",
            "in_channels": channels // 4,
            "mlp_ratio": 4.0,
            "num_heads": heads,
            "out_channels": (config["out_channels"] or channels) // 4,
            "patch_size": 2,
            "qkv_bias": True,
            "theta": 10000,
            "vec_in_dim": config["pooled_projection_dim"],
        },
    }


def _dense(model: QuantizedFlux) -> _Tensors:
    """Diffusers' tensors: stacked rows split, cut columns joined, the 1 of the modulations' scales taken out."""
    made: dict[str, Callable[[], Tensor]] = {}
    copies: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    columns: dict[str, list[LinearPlan]] = {}

    @lru_cache(maxsize=_CACHED_LINEARS)
    def dense(linear: LinearPlan) -> tuple[Tensor, Tensor]:
        weight, bias = model.linear(linear).dense()
        for start, stop in linear.plus_one:
            bias = torch.cat((bias[:start], bias[start:stop] - 1, bias[stop:]))
        return weight.to(model.dtype), bias.to(model.dtype)

    def rows(linear: LinearPlan, part: int, index: int) -> Tensor:
        return dense(linear)[part].chunk(len(linear.sources))[index].contiguous()

    def joined(linears: list[LinearPlan]) -> Tensor:
        return torch.cat([dense(linear)[0] for linear in linears], dim=1)

    for block in model.plan.blocks:
        for target, name in block.copies:
            copies[name] = model.spec[target]
            made[name] = partial(model.source.__getitem__, target)
        for linear in block.linears:
            for i, name in enumerate(linear.sources):
                made[f"{name}.weight"] = partial(rows, linear, 0, i)
                if linear.source_bias:
                    made[f"{name}.bias"] = partial(rows, linear, 1, i)
                if linear.columns is not None:
                    columns.setdefault(name, []).append(linear)
    for name, linears in columns.items():
        ordered = sorted(linears, key=lambda linear: linear.columns or (0, 0))
        made[f"{name}.weight"] = partial(joined, ordered)
    return _Tensors(dense_spec(model.plan, copies, model.dtype), lambda name: made[name]())
