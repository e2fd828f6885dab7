"""The native format: saved and loaded to the bit, strict about names, shapes, dtypes and its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support import DEVICES
from tonfa.checkpoint import native
from tonfa.checkpoint.strict import Spec
from tonfa.errors import CheckpointError, UnsupportedError

CONFIG = {
    "_class_name": native.MODEL_CLASS,
    "num_layers": 1,
    "quantization_config": native.quantization_config(16, {"rank": 16}),
}


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    return {
        "blocks.0.qweight": torch.randint(0, 256, (64, 32), dtype=torch.uint8),
        "blocks.0.wscales": torch.randn(1, 64).to(dtype),
        "blocks.0.bias": torch.randn(64).to(dtype),
        "norm.weight": torch.randn(8).to(dtype),
    }


def spec(values: dict[str, Tensor]) -> Spec:
    return {name: (tuple(t.shape), t.dtype) for name, t in values.items()}


@pytest.mark.parametrize("size", ["1GB", 2200, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype, size: int | str) -> None:
    saved = tensors(dtype)
    native.save(tmp_path / "out", CONFIG, saved, max_shard_size=size)
    found = native.load(tmp_path / "out", spec(saved))
    assert list(found) == list(saved)
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in saved.items())
    assert native.read_config(tmp_path / "out") == CONFIG
    count = len(list((tmp_path / "out").glob("*.safetensors")))
    assert count == {"1GB": 1, 2200: {torch.bfloat16: 2, torch.float32: 2}[dtype], 1: 4}[size]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_floats_are_cast_and_codes_are_not(tmp_path: Path, dtype: torch.dtype, device: str) -> None:
    saved = tensors()
    native.save(tmp_path / "out", CONFIG, saved)
    found = native.load(tmp_path / "out", spec(saved), device=device, dtype=dtype)
    for name, tensor in saved.items():
        expected = tensor if tensor.dtype == torch.uint8 else tensor.to(dtype)
        assert found[name].device.type == device
        assert torch.equal(found[name].cpu(), expected)


def test_loaded_tensors_may_be_written_to_without_changing_the_file(tmp_path: Path) -> None:
    saved = tensors()
    native.save(tmp_path / "out", CONFIG, saved)
    native.load(tmp_path / "out", spec(saved))["norm.weight"].zero_()
    assert torch.equal(native.load(tmp_path / "out", spec(saved))["norm.weight"], saved["norm.weight"])


def test_a_loaded_checkpoint_can_be_saved_over_itself(tmp_path: Path) -> None:
    saved = tensors()
    native.save(tmp_path / "out", CONFIG, saved)
    loaded = native.load(tmp_path / "out", spec(saved))
    native.save(tmp_path / "out", CONFIG, loaded, max_shard_size=1, overwrite=True)
    found = native.load(tmp_path / "out", spec(saved))
    assert all(torch.equal(found[name], t) for name, t in saved.items())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left_of_a_failed_save(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex64"):
        native.save(tmp_path / "out", CONFIG, {"a": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []
    native.save(tmp_path / "out", CONFIG, tensors())
    with pytest.raises(CheckpointError, match="not empty"):
        native.save(tmp_path / "out", CONFIG, tensors())


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not quantized"):
        native.save(tmp_path / "out", {"_class_name": "X"}, tensors())
    with pytest.raises(UnsupportedError, match="shard size"):
        native.save(tmp_path / "out", CONFIG, tensors(), max_shard_size="big")
    assert list(tmp_path.iterdir()) == []


def test_loading_is_strict_before_it_reads(tmp_path: Path) -> None:
    saved = tensors()
    native.save(tmp_path / "out", CONFIG, saved)
    wrong = {**spec(saved), "norm.bias": ((8,), torch.bfloat16), "blocks.0.wscales": ((2, 64), torch.bfloat16)}
    with pytest.raises(
        CheckpointError, match=r"out: .*\n.*missing: norm.bias\n.*wscales \(1, 64\), expected \(2, 64\)"
    ):
        native.load(tmp_path / "out", wrong)


def test_mixed_floats_are_refused(tmp_path: Path) -> None:
    saved = {**tensors(), "norm.weight": torch.randn(8)}
    native.save(tmp_path / "out", CONFIG, saved)
    with pytest.raises(CheckpointError, match="mixes floating dtypes"):
        native.load(tmp_path / "out", spec(saved))


def test_an_integer_dtype_is_no_target(tmp_path: Path) -> None:
    saved = tensors()
    native.save(tmp_path / "out", CONFIG, saved)
    with pytest.raises(CheckpointError, match="cannot be loaded as"):
        native.load(tmp_path / "out", spec(saved), dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": None}, "not quantized; run `tonfa quantize`"),
        ({"quantization_config": "int4"}, "quantization_config is str"),
        ({"quant_method": "bitsandbytes"}, "quantized by 'bitsandbytes'"),
        ({"format_version": 2}, "format version 2, this tonfa reads 1; upgrade"),
        ({"precision": "fp4"}, "precision 'fp4' is not supported, only 'int4'"),
        ({"group_size": 128}, "group_size 128 is not supported, only 64"),
        ({"rank": 0}, "rank 0 is no positive integer"),
        ({"rank": "32"}, "rank '32'"),
        ({"rank": True}, "rank True"),
        ({"rank": None}, "rank None"),
    ],
)
def test_other_configurations_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    if "quantization_config" in change:
        config |= change
    else:
        config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        native.read_config(tmp_path)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        native.read_config(tmp_path)
