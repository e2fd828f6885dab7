"""Diffusers' `nunchaku_lite` folders: read, written, and the same to Diffusers' own loader and modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxTransformer2DModel
from diffusers.quantizers.nunchaku import NunchakuLiteQuantizer
from diffusers.quantizers.quantization_config import NunchakuLiteQuantizationConfig
from flux_models import dense_model, inputs, run
from lite_models import WEIGHTS, dense_twin, diffusers_loader, quantized_modules, save_lite
from safetensors.torch import load_file, save_file

from support import DATA, relative_error
from tonfa.checkpoint import nunchaku_layout as layout
from tonfa.errors import CheckpointError
from tonfa.layers.bound import BoundModule
from tonfa.layers.stacked import StackedLinear
from tonfa.models.flux.export import export, read_quantized
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.quantizer.recipe import Recipe

TINY = DATA / "svdq-int4_r32-tiny.safetensors"
SHARED = ("branch", "smoothing", "nothing")

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What we write of a published checkpoint."""
    folder = tmp_path_factory.mktemp("lite") / "lite"
    export(read_quantized(TINY), folder, "nunchaku-lite")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Folders of others, whose q, k and v share more or less."""
    root, dense = tmp_path_factory.mktemp("folders"), dense_model()
    return {share: save_lite(root / share, dense, quantized_modules(dense, share)) for share in SHARED}


def load(path: Path, **options: object) -> SVDQFluxTransformer2DModel:
    return SVDQFluxTransformer2DModel.from_pretrained(path, **options)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a / WEIGHTS), load_file(b / WEIGHTS)
    return first.keys() == second.keys() and all(
        t.dtype == second[n].dtype and torch.equal(t.view(torch.uint8), second[n].view(torch.uint8))
        for n, t in first.items()
    )


@pytest.mark.parametrize("share", SHARED)
def test_without_activation_quantization_it_is_the_dense_model_of_its_weights(share: str, folders: Folders) -> None:
    dense = dense_model()
    values = inputs(dense, 2)
    expected = run(dense_twin(dense, quantized_modules(dense, share)), values)
    found = run(load(folders[share], dtype=torch.float32, activations="none"), values)
    assert relative_error(found, expected) < 1e-4
    assert relative_error(expected, run(dense, values)) > 1e-2  # the comparison can fail


@pytest.mark.parametrize("share", SHARED)
def test_layers_say_how_the_checkpoint_differs(share: str, folders: Folders) -> None:
    model = load(folders[share])
    quantization = model.config.quantization_config
    layers = quantization["layers"]
    qkv = {"branch": None, "smoothing": {"rank": 48}, "nothing": {"parts": 3}}[share]
    for name in ("transformer_blocks.1.attn.to_qkv", "single_transformer_blocks.0.attn.to_qkv"):
        assert layers.get(name) == qkv
    assert quantization["rank"] == 16
    assert layers["transformer_blocks.0.ff_context.down"] == {"unsigned": False}
    assert layers["single_transformer_blocks.1.ff.down"] == {"unsigned": False}
    assert layers["transformer_blocks.0.norm1_context.linear"] == {"plus_one": False}
    assert isinstance(model.transformer_blocks[0].attn.to_qkv, StackedLinear) == (share == "nothing")
    assert not model.single_transformer_blocks[0].ff.down.unsigned


@pytest.mark.parametrize("share", SHARED)
def test_comes_back_to_the_bit(share: str, folders: Folders, tmp_path: Path) -> None:
    export(read_quantized(folders[share]), tmp_path / "direct", "nunchaku-lite")
    export(read_quantized(folders[share]), tmp_path / "native", "native")
    export(read_quantized(tmp_path / "native"), tmp_path / "through", "nunchaku-lite")
    for copy in ("direct", "through"):
        assert same_tensors(tmp_path / copy, folders[share])
        found, expected = (config_of(f)["quantization_config"] for f in (tmp_path / copy, folders[share]))
        for section in ("svdq_w4a4", "awq_w4a16"):
            assert sorted(found[section].pop("targets")) == sorted(expected[section].pop("targets"))
        assert found == expected


@pytest.mark.parametrize("share", SHARED)
@pytest.mark.parametrize("activations", ["none", "int8", "int4"])
def test_saved_and_loaded_natively_it_computes_the_same(
    share: str, activations: str, folders: Folders, tmp_path: Path
) -> None:
    model = load(folders[share], activations=activations)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", activations=activations)
    values = inputs(model, dtype=torch.bfloat16)
    assert torch.equal(run(again, values), run(model, values))


@pytest.mark.parametrize(("activations", "bound"), [("none", 4e-3), ("int8", 6e-3), ("int4", 3e-2)])
def test_what_we_write_computes_what_the_original_does(lite: Path, activations: str, bound: float) -> None:
    """Under "int4" the layers behind a GELU have signed inputs instead of unsigned ones: one bit less."""
    original = load(TINY, activations=activations)
    values = inputs(original, 2, dtype=torch.bfloat16)
    assert relative_error(run(load(lite, activations=activations), values), run(original, values)) < bound


def branch(tensors: dict[str, torch.Tensor], up: str) -> torch.Tensor:
    """The product (N, K) of a packed low-rank branch."""
    down = up.replace("lora_up", "lora_down")
    n, k = (tensors[name].shape[0] for name in (up, down))
    unpacked = layout.unpack_lowrank(tensors[up], n, down=False), layout.unpack_lowrank(tensors[down], k, down=True)
    return unpacked[0].double() @ unpacked[1].double().T


def test_only_biases_change_on_the_way_there_and_back(lite: Path, tmp_path: Path) -> None:
    export(read_quantized(lite), tmp_path / "back.safetensors", "nunchaku")
    published, back = load_file(TINY), load_file(tmp_path / "back.safetensors")
    assert published.keys() == back.keys()
    for name, tensor in published.items():
        found = back[name]
        if name.endswith("lora_up"):
            assert relative_error(branch(back, name), branch(published, name)) < 1e-12, name
        elif name.endswith("lora_down"):
            assert found.shape[1] == 2 * tensor.shape[1]
        elif "fc2.bias" in name:
            assert relative_error(found, tensor) < 1e-2
        elif not name.endswith("smooth_orig"):
            assert torch.equal(found, tensor), name
    for activations in ("none", "int4"):
        a, b = (load(p, activations=activations) for p in (TINY, tmp_path / "back.safetensors"))
        values = inputs(a, dtype=torch.bfloat16)
        assert relative_error(run(b, values), run(a, values)) < 1e-2


def test_diffusers_makes_the_very_tensors_that_we_write(lite: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, shapes and dtypes of the modules that Diffusers' quantizer puts in place, on the meta device."""
    written = {n: (tuple(t.shape), t.dtype) for n, t in load_file(lite / WEIGHTS).items()}
    config = NunchakuLiteQuantizationConfig.from_dict(config_of(lite)["quantization_config"])
    assert (config.compute_dtype, config.svdq_w4a4["rank"]) == (torch.bfloat16, 64)
    assert len(config.svdq_w4a4["targets"]) == 2 * 12 + 2 * 5 and len(config.awq_w4a16["targets"]) == 2 * 2 + 2
    with diffusers_loader(monkeypatch):
        with torch.device("meta"):
            model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(lite))
        torch.nn.Module.to(model, torch.bfloat16)
        NunchakuLiteQuantizer(config)._process_model_before_weight_loading(model, written)
        made = {n: (tuple(t.shape), t.dtype) for n, t in model.state_dict().items()}
    assert made == written


@pytest.mark.parametrize("source", ["ours", *SHARED])
def test_diffusers_loads_the_folder_and_computes_what_we_do(
    source: str, lite: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diffusers' own loader, modules and forward pass; the kernels that it calls are the references of our ops.

    In float32, because Diffusers rounds more often than the fused model, and 4-bit codes of random models flip then.
    """
    folder = lite if source == "ours" else folders[source]
    ours = load(folder, activations="int4", dtype=torch.float32)
    values = inputs(ours, 2)
    with diffusers_loader(monkeypatch) as modules:
        theirs = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
        assert isinstance(theirs.single_transformer_blocks[0].proj_out, modules.SVDQW4A4Linear)
        expected = run(theirs, values)
    assert relative_error(run(ours, values), expected) < 1e-5
    unquantized = run(ours.set_activations("none"), values)
    assert relative_error(unquantized, expected) > 1e-3  # the comparison can fail


@pytest.mark.parametrize("activations", ["int8", "int4"])
def test_parts_may_stay_on_the_host_between_blocks(activations: str, folders: Folders) -> None:
    model = load(folders["nothing"], activations=activations)
    values = inputs(model, dtype=torch.bfloat16)
    expected = run(model, values)
    cpu_offload(model, torch.device("cpu"))
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(**values, return_dict=False)[0], expected)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert not any(m._binding for m in model.modules() if isinstance(m, BoundModule))


def test_sharded_folders_and_float16(folders: Folders, tmp_path: Path) -> None:
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in load_file(folders["branch"] / WEIGHTS).items()}
    names = sorted(tensors)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({n: tensors[n] for n in held}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {n: file for file, held in shards.items() for n in held}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    config = config_of(folders["branch"])
    config["quantization_config"]["compute_dtype"] = "float16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, expected = load(tmp_path), load(folders["branch"])
    assert found.dtype == torch.float16
    for name, tensor in expected.state_dict().items():
        assert relative_error(found.state_dict()[name], tensor) < 1e-3 or torch.equal(found.state_dict()[name], tensor)


def test_floats_are_cast_as_diffusers_casts_them(folders: Folders, tmp_path: Path) -> None:
    """Outside of the 4-bit modules files may hold float32; `compute_dtype` is what counts."""
    tensors = load_file(folders["branch"] / WEIGHTS)
    tensors["x_embedder.weight"] = tensors["x_embedder.weight"].float()
    save_file(tensors, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config_of(folders["branch"])))
    found, expected = (load(folder).state_dict() for folder in (tmp_path, folders["branch"]))
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())


def test_separate_smoothing_has_no_place_in_nunchakus_containers(folders: Folders, tmp_path: Path) -> None:
    for form, name in (("nunchaku", "a.safetensors"), ("nunchaku-folder", "b")):
        with pytest.raises(CheckpointError, match=r"attn\.to_qkv has a smoothing factor for each of .*to_q, .*to_v"):
            export(read_quantized(folders["nothing"]), tmp_path / name, form)
    export(read_quantized(folders["smoothing"]), tmp_path / "c.safetensors", "nunchaku")
    a, b = (load(p, activations="none") for p in (folders["smoothing"], tmp_path / "c.safetensors"))
    values = inputs(a, dtype=torch.bfloat16)
    assert b.config.quantization_config["rank"] == 48
    assert relative_error(run(b, values), run(a, values)) < 1e-2


@pytest.mark.parametrize("share", SHARED)
def test_dense_weights_of_a_lite_folder(share: str, folders: Folders, tmp_path: Path) -> None:
    export(read_quantized(folders[share]), tmp_path / "dense", "dense")
    dense = dense_model()
    expected = dense_twin(dense, quantized_modules(dense, share)).state_dict()
    for name, tensor in FluxTransformer2DModel.from_pretrained(tmp_path / "dense").state_dict().items():
        assert relative_error(tensor, expected[name]) < 4e-3, name


def test_sizes_that_tiles_do_not_fit(tmp_path: Path) -> None:
    small = dense_model(dtype=torch.bfloat16, num_attention_heads=1, num_layers=1, num_single_layers=0)
    SVDQFluxTransformer2DModel.from_dense(small, Recipe(rank=16, iterations=0)).save_pretrained(tmp_path / "q")
    with pytest.raises(CheckpointError, match=r"attn\.to_q is 64 x 64; nunchaku_lite layers need multiples of 128"):
        export(read_quantized(tmp_path / "q"), tmp_path / "lite", "nunchaku-lite")
    assert not (tmp_path / "lite").exists()


def test_float32_is_not_written(tmp_path: Path) -> None:
    model = SVDQFluxTransformer2DModel.from_dense(dense_model(), Recipe(rank=16, iterations=0))
    model.save_pretrained(tmp_path / "q")
    with pytest.raises(CheckpointError, match="float32, but nunchaku_lite has 16 bits"):
        export(read_quantized(tmp_path / "q"), tmp_path / "lite", "nunchaku-lite")
