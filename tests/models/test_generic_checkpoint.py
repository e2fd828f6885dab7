"""Any quantized model saved and loaded: equal outputs, the skeleton made again, damage named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from generic_models import PIXART, output, pixart
from torch import nn

import tonfa
from tonfa import CheckpointError, LinearRule, Plan, Recipe, SVDQLinear, UnsupportedError

PLAN = Plan(
    (
        r"transformer_blocks\.0\.attn1\.to_[qkv]",
        LinearRule(r"transformer_blocks\.1\.ff\.net\.2", unsigned=True, rank=32),
        LinearRule(r"adaln_single\.linear", kind="w4a16"),
    )
)
NAME = "transformer_blocks.1.ff.net.2"


@pytest.fixture(scope="module")
def quantized() -> PixArtTransformer2DModel:
    return tonfa.quantize(pixart(), PLAN, recipe=Recipe(rank=16, iterations=0), activations="int8")


@pytest.fixture
def folder(quantized: PixArtTransformer2DModel, tmp_path: Path) -> Path:
    tonfa.save_model(quantized, tmp_path / "model")
    return tmp_path / "model"


def skeleton() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(**PIXART).eval()


def test_loaded_equals_saved(quantized: PixArtTransformer2DModel, folder: Path) -> None:
    model = skeleton()
    found = tonfa.load_model(model, folder, activations="int8")
    assert found is model
    for name, tensor in quantized.state_dict().items():
        assert torch.equal(tensor, found.state_dict()[name]), name
    layer = found.get_submodule(NAME)
    assert isinstance(layer, SVDQLinear)
    assert (layer.unsigned, layer.rank, layer.qweight.requires_grad) == (True, 32, False)
    assert torch.equal(output(found, 5), output(quantized, 5))


def test_shards_and_the_diffusers_configuration(quantized: PixArtTransformer2DModel, tmp_path: Path) -> None:
    tonfa.save_model(quantized, tmp_path / "model", max_shard_size="100KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["_class_name"] == "PixArtTransformer2DModel"
    model = PixArtTransformer2DModel.from_config({k: v for k, v in config.items() if k != "quantization_config"})
    found = tonfa.load_model(model.eval(), tmp_path / "model", activations="int8")
    assert torch.equal(output(found, 5), output(quantized, 5))


def test_models_of_no_library(tmp_path: Path) -> None:
    def made() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64, bias=False), nn.SiLU(), nn.Linear(64, 10))

    torch.manual_seed(0)
    model = tonfa.quantize(made(), Plan(("0",)), recipe=Recipe(16))
    tonfa.save_model(model, tmp_path / "model")
    with torch.device("meta"):
        found = made()
    tonfa.load_model(found, tmp_path / "model")
    x = torch.randn(3, 64)
    assert torch.equal(found(x), model(x))


def test_a_dense_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="has no 4-bit linears"):
        tonfa.save_model(nn.Linear(64, 64), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def edit(folder: Path, name: str, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["linears"].setdefault(name, {}).update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("no.such", {"kind": "w4a16"}, r"no\.such is no torch\.nn\.Linear"),
        (NAME, {"in_features": 576}, r"net\.2 is 128 x 576, the model's is 128 x 512"),
        (NAME, {"rank": "32"}, r"net\.2 is described by .*damaged"),
        (NAME, {"rank": True}, r"damaged"),
        (NAME, {"rank": 0}, r"rank 0"),
        (NAME, {"rank": 4096}, r"rank 4096 exceeds"),
        (NAME, {"extra": 1}, r"damaged"),
        (NAME, {"rank": 16}, r"of another shape: .*proj_down"),
        ("proj_out", {"kind": "w4a16", "in_features": 128, "out_features": 32}, r"missing: proj_out\.qweight"),
    ],
)
def test_descriptions_that_do_not_fit_are_named_and_the_model_stays(
    folder: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    edit(folder, name, **changes)
    model = skeleton()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        tonfa.load_model(model, folder)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_folder_without_the_list_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["linears"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="lists no linears"):
        tonfa.load_model(skeleton(), folder)


def test_damaged_values_are_named(quantized: PixArtTransformer2DModel, tmp_path: Path) -> None:
    broken = copy.deepcopy(quantized)
    broken.get_submodule(NAME).smooth_factor.data[3] = 0
    tonfa.save_model(broken, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"net\.2\.smooth_factor: 1 of 512 smoothing factors are not positive"):
        tonfa.load_model(skeleton(), tmp_path / "model")


def test_buffers_that_no_file_holds_are_named(folder: Path) -> None:
    with torch.device("meta"):
        model = skeleton()
    with pytest.raises(
        CheckpointError, match=r"does not hold pos_embed\.pos_embed; build the model outside of the meta"
    ):
        tonfa.load_model(model, folder)
    assert not any(isinstance(layer, SVDQLinear) for layer in model.modules())
