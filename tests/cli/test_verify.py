from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flux_models import dense_model
from lite_models import quantized_modules, save_lite
from safetensors.torch import load_file, save_file

from tonfa import SVDQFluxTransformer2DModel
from tonfa.quantizer.recipe import Recipe

TINY = Path(__file__).parents[1] / "data" / "svdq-int4_r32-tiny.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A dense transformer and its 4-bit form."""
    dense = dense_model(dtype=torch.bfloat16, num_layers=1, num_single_layers=1)
    dense.save_pretrained(tmp_path / "dense")
    SVDQFluxTransformer2DModel.from_dense(dense, Recipe(rank=16, iterations=0)).save_pretrained(tmp_path / "q")
    return tmp_path / "dense", tmp_path / "q"


def test_sound(tonfa) -> None:
    result = tonfa("verify", TINY)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith("tensors, sound\n")


def test_errors_against_dense_weights(tonfa, folders: tuple[Path, Path]) -> None:
    dense, quantized = folders
    result = tonfa("verify", quantized, "--against", dense, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    errors = list(report["errors"].values())
    assert report["ok"] and len(errors) == 10 + 5
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1] <= errors[0] < 0.2
    assert "largest relative errors" in tonfa("verify", quantized, "--against", dense).stdout
    (file,) = dense.glob("*.safetensors")
    of_file = tonfa("verify", quantized, "--against", file, "--json")
    assert json.loads(of_file.stdout)["errors"] == json.loads(result.stdout)["errors"]
    missing = tonfa("verify", quantized, "--against", "nowhere")
    assert missing.exit_code == 1 and "error: --against: nowhere is no folder here" in missing.stderr
    wrong = tonfa("verify", quantized, "--against", dense / "config.json")
    assert wrong.exit_code == 1 and "config.json: is truncated or damaged" in wrong.stderr


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("transformer_blocks.0.ff.up.wscales", float("nan"), "not finite"),
        ("x_embedder.bias", float("inf"), "not finite"),
        ("transformer_blocks.0.ff.up.smooth_factor", 0.0, "not positive"),
        ("transformer_blocks.0.ff.up.smooth_factor", -1.0, "not positive"),
    ],
)
def test_bad_values_are_named(tonfa, folders: tuple[Path, Path], name: str, value: float, problem: str) -> None:
    _, quantized = folders
    tensors = load_file(quantized / WEIGHTS)
    tensors[name].view(-1)[3] = value
    save_file(tensors, quantized / WEIGHTS)
    result = tonfa("verify", quantized, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and not report["ok"]
    assert [p["tensor"] for p in report["problems"]] == [name] and problem in report["problems"][0]["problem"]
    assert f"wrong: {name}" in tonfa("verify", quantized).stdout


def test_an_error_that_is_not_finite_comes_first_and_is_json(tonfa, folders: tuple[Path, Path]) -> None:
    dense, quantized = folders
    name = "single_transformer_blocks.0.ff.up"
    tensors = load_file(quantized / WEIGHTS)
    tensors[f"{name}.wscales"].view(-1)[3] = float("nan")
    save_file(tensors, quantized / WEIGHTS)
    result = tonfa("verify", quantized, "--against", dense, "--json")
    report = json.loads(result.stdout, parse_constant=pytest.fail)
    assert result.exit_code == 1 and next(iter(report["errors"].items())) == (name, None)
    assert f"not finite  {name}" in tonfa("verify", quantized, "--against", dense).stdout


def test_another_model(tonfa, folders: tuple[Path, Path]) -> None:
    dense, quantized = folders
    tensors = load_file(dense / WEIGHTS)
    tensors["transformer_blocks.0.ff.net.2.weight"].neg_()
    save_file(tensors, dense / WEIGHTS)
    result = tonfa("verify", quantized, "--against", dense, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 1
    assert next(iter(report["errors"])) == "transformer_blocks.0.ff.down"
    assert [p["tensor"] for p in report["problems"]] == ["transformer_blocks.0.ff.down"]


def test_missing_tensor(tonfa, folders: tuple[Path, Path]) -> None:
    _, quantized = folders
    tensors = load_file(quantized / WEIGHTS)
    del tensors["x_embedder.bias"]
    save_file(tensors, quantized / WEIGHTS)
    result = tonfa("verify", quantized)
    assert result.exit_code == 1 and "1 missing: x_embedder.bias" in result.stderr


@pytest.mark.parametrize("share", ["branch", "smoothing", "nothing"])
def test_diffusers_4_bit_folder(tonfa, share: str, tmp_path: Path) -> None:
    dense = dense_model(num_layers=1, num_single_layers=1)
    torch.nn.Module.to(dense, torch.bfloat16).save_pretrained(tmp_path / "dense")
    lite = save_lite(tmp_path / "lite", dense, quantized_modules(dense, share))
    result = tonfa("verify", lite, "--against", tmp_path / "dense", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    errors = report["errors"]
    assert report["ok"] and report["problems"] == [] and len(errors) == 10 + 5
    assert all(0.01 < error < 0.2 for error in errors.values())

    tensors = load_file(lite / WEIGHTS)
    tensors["single_transformer_blocks.0.attn.to_v.smooth_factor"].view(-1)[3] = 0
    save_file(tensors, lite / WEIGHTS)
    report = json.loads(tonfa("verify", lite, "--json").stdout)
    # One changed factor alone sets the three apart, so the part is named whatever they shared.
    named = "single_transformer_blocks.0.attn.to_qkv.parts.2.smooth_factor"
    assert [p["tensor"] for p in report["problems"]] == [named]
