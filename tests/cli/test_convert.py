from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from flux_models import dense_model, inputs, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tonfa import SVDQFluxTransformer2DModel
from tonfa.checkpoint import nunchaku_layout as layout
from tonfa.quantizer.recipe import Recipe

TINY = Path(__file__).parents[1] / "data" / "svdq-int4_r32-tiny.safetensors"
DENSE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A depth model of 16-bit floats, hidden size 128."""
    folder = tmp_path_factory.mktemp("native") / "q"
    dense = dense_model(dtype=torch.bfloat16)
    SVDQFluxTransformer2DModel.from_dense(dense, Recipe(rank=16, iterations=0)).save_pretrained(folder)
    return folder


def _state(path: Path) -> dict[str, torch.Tensor]:
    return SVDQFluxTransformer2DModel.from_pretrained(path).state_dict()


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_every_container_holds_the_same_numbers(tonfa, native: Path, tmp_path: Path) -> None:
    steps = (("nunchaku", "a.safetensors"), ("nunchaku-folder", "b"), ("native", "c"))
    source = native
    for form, name in steps:
        result = tonfa("convert", source, tmp_path / name, "--to", form)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == f"{tmp_path / name}\n"
        source = tmp_path / name
        assert _equal(_state(native), _state(source))
    assert _equal(load_file(native / DENSE), load_file(tmp_path / "c" / DENSE))


def test_the_published_writers_file_comes_back(tonfa, tmp_path: Path) -> None:
    assert tonfa("convert", TINY, tmp_path / "q", "--to", "native").exit_code == 0
    assert tonfa("convert", tmp_path / "q", tmp_path / "back.safetensors", "--to", "nunchaku").exit_code == 0
    published, back = load_file(TINY), load_file(tmp_path / "back.safetensors")
    assert published.keys() == back.keys()
    for name, tensor in published.items():
        if name.endswith(".smooth_orig"):
            assert torch.equal(back[name], back[name.removesuffix("_orig")])
            continue
        if name.endswith((".wscales", ".wzeros")):  # a modulation's may have rows of padding
            tensor = tensor[: len(back[name])]
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name


def test_metadata_of_the_single_file(tonfa, native: Path, tmp_path: Path) -> None:
    assert tonfa("convert", native, tmp_path / "a.safetensors", "--to", "nunchaku").exit_code == 0
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["model_class"] == "NunchakuFluxTransformer2dModel"
    int4 = {"dtype": "int4", "scale_dtype": None, "group_size": 64}
    expected = {"method": "svdquant", "weight": int4, "activation": int4, "rank": 16}
    assert json.loads(metadata["quantization_config"]) == expected
    config, comfy = json.loads(metadata["config"]), json.loads(metadata["comfy_config"])
    assert (config["in_channels"], config["out_channels"], config["num_single_layers"]) == (128, 64, 2)
    assert "quantization_config" not in config
    assert comfy["model_class"] == "Flux"
    assert (comfy["model_config"]["in_channels"], comfy["model_config"]["out_channels"]) == (32, 16)
    assert tonfa("convert", native, tmp_path / "folder", "--to", "nunchaku-folder").exit_code == 0
    assert json.loads((tmp_path / "folder" / "comfy_config.json").read_text()) == comfy
    assert json.loads((tmp_path / "folder" / "config.json").read_text()) == config


def test_dense_weights_are_near_the_ones_that_were_quantized(tonfa, tmp_path: Path) -> None:
    """Biases and norms all but exactly: split, joined, unshifted, and without the 1 of the modulations' scales."""
    model = dense_model(dtype=torch.float32)
    quantized = SVDQFluxTransformer2DModel.from_dense(model, Recipe(rank=16, iterations=0))
    quantized.save_pretrained(tmp_path / "q")
    assert tonfa("convert", tmp_path / "q", tmp_path / "dense", "--to", "dense").exit_code == 0
    back = FluxTransformer2DModel.from_pretrained(tmp_path / "dense").state_dict()
    original = model.state_dict()
    assert back.keys() == original.keys()
    for name, tensor in original.items():
        error = (back[name] - tensor).norm() / tensor.norm()
        assert error < (0.2 if tensor.ndim == 2 else 1e-3), (name, error)


def test_dense_weights_compute_what_the_4_bit_ones_do(tonfa, tmp_path: Path) -> None:
    """With 16-bit activations the two models differ by rounding alone, behind a GELU too."""
    model = dense_model(dtype=torch.float32)
    SVDQFluxTransformer2DModel.from_dense(model, Recipe(rank=16, iterations=0)).save_pretrained(tmp_path / "q")
    assert tonfa("convert", tmp_path / "q", tmp_path / "dense", "--to", "dense").exit_code == 0
    quantized = SVDQFluxTransformer2DModel.from_pretrained(tmp_path / "q", activations="none")
    dense = FluxTransformer2DModel.from_pretrained(tmp_path / "dense")
    values = inputs(model)
    expected = run(quantized, values)
    assert (run(dense, values) - expected).norm() / expected.norm() < 1e-4


def test_what_is_in_the_way(tonfa, native: Path, tmp_path: Path) -> None:
    for form, name in (("nunchaku", "a.safetensors"), ("nunchaku-folder", "b"), ("dense", "c")):
        command = ("convert", native, tmp_path / name, "--to", form)
        assert tonfa(*command).exit_code == 0
        refused = tonfa(*command)
        assert refused.exit_code == 1 and "exists" in refused.stderr
        assert tonfa(*command, "--overwrite").exit_code == 0
    assert "end with .safetensors" in tonfa("convert", native, tmp_path / "d", "--to", "nunchaku").stderr
    assert tonfa("convert", native, tmp_path / "d", "--to", "gguf").exit_code == 2
    assert not (tmp_path / "d").exists()


def test_float32_is_not_nunchakus(tonfa, tmp_path: Path) -> None:
    model = dense_model(num_layers=1, num_single_layers=1)
    SVDQFluxTransformer2DModel.from_dense(model, Recipe(rank=16, iterations=0)).save_pretrained(tmp_path / "q")
    result = tonfa("convert", tmp_path / "q", tmp_path / "a.safetensors", "--to", "nunchaku")
    assert result.exit_code == 1 and "float32" in result.stderr
    assert not (tmp_path / "a.safetensors").exists()


def test_values_that_cannot_be_computed_with_are_not_passed_on(tonfa, native: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "config.json").write_bytes((native / "config.json").read_bytes())
    for name, value in (("proj_out.weight", float("nan")), ("transformer_blocks.0.ff.up.smooth_factor", 0.0)):
        tensors = load_file(native / DENSE)
        tensors[name].view(-1)[3] = value
        save_file(tensors, tmp_path / "q" / DENSE)
        for form, out in (("native", "a"), ("dense", "b"), ("nunchaku-folder", "c"), ("nunchaku", "d.safetensors")):
            result = tonfa("convert", tmp_path / "q", tmp_path / out, "--to", form)
            assert result.exit_code == 1 and f"{name}: 1 of " in result.stderr, result.output
            assert not (tmp_path / out).exists()


def test_diffusers_4_bit_form_and_back(tonfa, tmp_path: Path) -> None:
    result = tonfa("convert", TINY, tmp_path / "lite", "--to", "nunchaku-lite")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'lite'}\n"
    config = json.loads((tmp_path / "lite" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert (config["_class_name"], quantization["quant_method"]) == ("FluxTransformer2DModel", "nunchaku_lite")
    assert (quantization["compute_dtype"], quantization["svdq_w4a4"]["rank"]) == ("bfloat16", 64)
    for form, name in (("native", "q"), ("nunchaku-lite", "again")):
        source = tmp_path / ("q" if (tmp_path / "q").exists() else "lite")
        assert tonfa("convert", source, tmp_path / name, "--to", form).exit_code == 0
    assert _equal(load_file(tmp_path / "lite" / DENSE), load_file(tmp_path / "again" / DENSE))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_ranks_are_filled_up_to_a_multiple_of_16(tonfa, native: Path, tmp_path: Path) -> None:
    """Branches are wide enough for both halves of `proj_out`; what is added are zeros."""
    assert tonfa("convert", native, tmp_path / "lite", "--to", "nunchaku-lite").exit_code == 0
    name = "transformer_blocks.0.ff.net.0.proj"
    down = load_file(tmp_path / "lite" / DENSE)[f"{name}.proj_down"]
    assert down.shape == (128, 32)
    kept = layout.unpack_lowrank(down, 128, down=True)
    assert torch.equal(kept[:, :16], load_file(native / DENSE)["transformer_blocks.0.ff.up.proj_down"])
    assert not kept[:, 16:].any()
