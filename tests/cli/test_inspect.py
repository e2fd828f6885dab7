from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flux_models import dense_model
from lite_models import quantized_modules, save_lite
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tonfa import SVDQFluxTransformer2DModel
from tonfa.quantizer.recipe import Recipe

TINY = Path(__file__).parents[1] / "data" / "svdq-int4_r32-tiny.safetensors"


def test_single_file(tonfa) -> None:
    result = tonfa("inspect", TINY, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert (facts["container"], facts["dialect"], facts["dtype"]) == ("nunchaku", "v1", "bfloat16")
    assert (facts["precision"], facts["rank"], facts["group_size"]) == ("int4", 32, 64)
    assert sum(kind["tensors"] for kind in facts["kinds"].values()) == facts["tensors"]
    assert sum(kind["bytes"] for kind in facts["kinds"].values()) == facts["bytes"] < TINY.stat().st_size
    linears = 8 * facts["architecture"]["num_layers"] + 4 * facts["architecture"]["num_single_layers"]
    assert facts["kinds"]["codes"]["tensors"] == facts["kinds"]["scales"]["tensors"] == linears
    assert facts["kinds"]["low_rank"]["tensors"] == 2 * linears


def test_native_folder_and_its_text(tonfa, tmp_path: Path) -> None:
    dense = dense_model(dtype=torch.bfloat16)
    model = SVDQFluxTransformer2DModel.from_dense(dense, Recipe(rank=16, iterations=0))
    model.transformer_blocks[0].ff.up.smooth_factor.fill_(1)
    model.transformer_blocks[0].ff.up.wscales.neg_()
    model.save_pretrained(tmp_path / "q")
    facts = json.loads(tonfa("inspect", tmp_path / "q", "--json").stdout)
    assert (facts["container"], facts["rank"], facts["architecture"]["in_channels"]) == ("native", 16, 128)
    found = {oddity["what"]: oddity["tensors"] for oddity in facts["oddities"]}
    assert "transformer_blocks.0.ff.up.smooth_factor" in found["smoothing is all ones"]
    assert "transformer_blocks.0.ff.up.wscales" in found["negative scales"]
    text = tonfa("inspect", tmp_path / "q").stdout
    assert "native folder" in text and "rank 16" in text and "odd: negative scales" in text


def test_unused_smoothing_of_its_own(tonfa, tmp_path: Path) -> None:
    with safe_open(TINY, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(TINY)
    name = "single_transformer_blocks.1.mlp_fc1.smooth_orig"
    tensors[name] = tensors[name] * 2
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    facts = json.loads(tonfa("inspect", tmp_path / "a.safetensors", "--json").stdout)
    found = {oddity["what"]: oddity for oddity in facts["oddities"]}
    assert found["smoothing that is unused differs from the one in use"]["tensors"] == [name]


def test_dense_folder(tonfa, tmp_path: Path) -> None:
    dense_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    facts = json.loads(tonfa("inspect", tmp_path / "dense", "--json").stdout)
    assert (facts["container"], facts["precision"], set(facts["kinds"])) == ("diffusers", None, {"dense"})
    assert "not quantized" in tonfa("inspect", tmp_path / "dense").stdout


def test_diffusers_4_bit_folder(tonfa, tmp_path: Path) -> None:
    dense = dense_model(num_layers=1, num_single_layers=1)
    for share, odd in (("branch", False), ("nothing", True)):
        folder = save_lite(tmp_path / share, dense, quantized_modules(dense, share))
        result = tonfa("inspect", folder, "--json")
        assert result.exit_code == 0, result.stderr
        facts = json.loads(result.stdout)
        assert (facts["container"], facts["dialect"], facts["dtype"]) == ("nunchaku-lite", "diffusers", "bfloat16")
        assert (facts["precision"], facts["rank"], facts["group_size"]) == ("int4", 16, 64)
        assert facts["kinds"]["codes"]["tensors"] == 12 + 5
        assert facts["kinds"]["modulations"]["tensors"] == 3 * 4
        assert sum(kind["bytes"] for kind in facts["kinds"].values()) == facts["bytes"]
        found = {oddity["what"]: oddity["tensors"] for oddity in facts["oddities"]}
        apart = ["attn.to_qkv", "attn.add_qkv_proj"]
        expected = [f"transformer_blocks.0.{n}" for n in apart] + ["single_transformer_blocks.0.attn.to_qkv"]
        assert found.get("q, k and v smoothed apart, so quantized three times", []) == (expected if odd else [])
    assert "Diffusers' nunchaku_lite folder, diffusers names" in tonfa("inspect", tmp_path / "branch").stdout


@pytest.mark.parametrize("name", ["missing", "missing.safetensors"])
def test_nothing_there(tonfa, tmp_path: Path, name: str) -> None:
    result = tonfa("inspect", tmp_path / name)
    assert result.exit_code == 1 and result.stderr.startswith("error: ") and result.stdout == ""
