"""Damaged `nunchaku_lite` folders: each is refused with one CheckpointError, or loads as the very same model."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flux_models import dense_model
from lite_models import WEIGHTS, quantized_modules, save_lite
from safetensors.torch import load_file, save_file
from torch import Tensor

from tonfa.errors import CheckpointError
from tonfa.models.flux.audit import inspect_checkpoint, verify_checkpoint
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel

Config = dict[str, Any]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block of each kind, q, k and v without anything in common."""
    dense = dense_model(num_layers=1, num_single_layers=1)
    return save_lite(tmp_path_factory.mktemp("lite") / "sound", dense, quantized_modules(dense, "nothing"))


@pytest.fixture(scope="module")
def sound(folder: Path) -> Tensors:
    return load(folder).state_dict()


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    for name in ("config.json", WEIGHTS):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def load(path: Path) -> SVDQFluxTransformer2DModel:
    return SVDQFluxTransformer2DModel.from_pretrained(path)


def refused(path: Path, sound: Tensors) -> bool:
    """Whether loading raises its one error; otherwise the model has to be the same."""
    try:
        state = load(path).state_dict()
    except CheckpointError as error:
        assert str(path) in str(error) or "config.json" in str(error)
        return True
    assert state.keys() == sound.keys()
    assert all(torch.equal(tensor, sound[name]) for name, tensor in state.items())
    return False


QKV, OUT = "transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.proj_out"
NORM = "transformer_blocks.0.norm1.linear"
NAMES = [
    f"{m}.{f}" for m in (QKV, OUT) for f in ("qweight", "wscales", "bias", "smooth_factor", "proj_down", "proj_up")
]
NAMES += [f"{NORM}.{field}" for field in ("qweight", "wscales", "wzeros", "bias")] + ["x_embedder.weight"]


def rename(tensors: Tensors, name: str) -> None:
    tensors[name.replace("attn.to_k", "attn.to_qkv").replace("linear", "lin") + "x"] = tensors.pop(name)


def poison(value: float) -> Callable[[Tensors, str], None]:
    def change(tensors: Tensors, name: str) -> None:
        if tensors[name].is_floating_point():
            tensors[name].view(-1)[5] = value
        else:
            tensors.pop(name)

    return change


def scalar(tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].view(-1)[0].clone()


CHANGES: dict[str, Callable[[Tensors, str], object]] = {
    "missing": lambda t, n: t.pop(n),
    "renamed": rename,
    "row short": lambda t, n: t.update({n: t[n][:-1].clone()}),
    "doubled": lambda t, n: t.update({n: torch.cat([t[n], t[n]])}),
    "extra dimension": lambda t, n: t.update({n: t[n][None].clone()}),
    "scalar": scalar,
    "empty": lambda t, n: t.update({n: t[n][:0].clone()}),
    "int16": lambda t, n: t.update({n: t[n].to(torch.int16)}),
    "fp8": lambda t, n: t.update({n: t[n].float().to(torch.float8_e4m3fn)}),
    "float64": lambda t, n: t.update({n: t[n].double()}),
    "NaN": poison(float("nan")),
    "Inf": poison(float("-inf")),
    "twin": lambda t, n: t.update({n + "_orig": t[n].clone()}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_damaged_tensors(change: str, damaged: Path, sound: Tensors) -> None:
    tensors = load_file(damaged / WEIGHTS)
    for name in NAMES:
        changed = {n: t.clone() if n == name else t for n, t in tensors.items()}
        CHANGES[change](changed, name)
        save_file(changed, damaged / WEIGHTS)
        assert refused(damaged, sound), name


@pytest.mark.parametrize("seed", range(3))
def test_swapped_tensors(seed: int, damaged: Path, sound: Tensors) -> None:
    """Tensors of other shapes or dtypes in each other's place."""
    rng, tensors = random.Random(seed), load_file(damaged / WEIGHTS)
    names = sorted(tensors)
    count = 0
    while count < 12:
        a, b = rng.sample(names, 2)
        if (tensors[a].shape, tensors[a].dtype) != (tensors[b].shape, tensors[b].dtype):
            save_file({**tensors, a: tensors[b], b: tensors[a]}, damaged / WEIGHTS)
            assert refused(damaged, sound), (a, b)
            count += 1


def changed_configs(config: Config) -> Iterator[tuple[str, Any]]:
    """Every field of config.json with values that it must not have."""
    wrong: tuple[Any, ...] = (None, -1, 0, 3, 10**18, 1.5, True, "int8", [], {}, [[]], {"a": 1})
    sections = ("svdq_w4a4", "awq_w4a16")
    places = [("quantization_config",)]
    places += [("quantization_config", key) for key in config["quantization_config"]]
    places += [("quantization_config", s, key) for s in sections for key in config["quantization_config"][s]]
    for place in places:
        for value in wrong:
            new = copy.deepcopy(config)
            at = new
            for key in place[:-1]:
                at = at[key]
            at[place[-1]] = value
            yield f"{'.'.join(place)} = {value!r}", new
    for key in ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "in_channels"):
        for value in (-1, 0, 7, 10**9, "2", None, 2.5):
            yield f"{key} = {value!r}", {**config, key: value}
    for section in sections:
        for change in (
            lambda t: t[1:],
            lambda t: [*t, "proj_out"],
            lambda t: [*t, t[0]],
            lambda t: [*t, 7],
            lambda t: [*t[1:], t[0].replace("0", "9")],
            lambda t: "".join(t),
        ):
            new = copy.deepcopy(config)
            entry = new["quantization_config"][section]
            entry["targets"] = change(entry["targets"])
            yield f"{section}.targets", new
        new = copy.deepcopy(config)
        new["quantization_config"][section]["precision"] = "nvfp4"
        yield f"{section} in NVFP4", new
        new = copy.deepcopy(config)
        del new["quantization_config"][section]
        yield f"no {section}", new
    yield "unknown key", {**config, "quantization_config": {**config["quantization_config"], "act_unsigned": []}}
    yield "another class", {**config, "_class_name": "QwenImageTransformer2DModel"}
    yield "another argument", {**config, "surprise": 1}


def test_changed_configurations(damaged: Path, sound: Tensors) -> None:
    config = json.loads((damaged / "config.json").read_text())
    count, harmless = 0, []
    for what, new in changed_configs(config):
        (damaged / "config.json").write_text(json.dumps(new))
        count += 1
        if not refused(damaged, sound):
            harmless.append(what)
    assert count > 150
    assert harmless == ["quantization_config.compute_dtype = None"]  # Diffusers' default


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '{"quantization_config": 7}', "\x00", '"nunchaku_lite"'])
def test_no_configuration(text: str, damaged: Path, sound: Tensors) -> None:
    (damaged / "config.json").write_text(text)
    assert refused(damaged, sound)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files(seed: int, damaged: Path, sound: Tensors) -> None:
    """Truncated anywhere, or bytes of the header changed."""
    whole, rng = (damaged / WEIGHTS).read_bytes(), random.Random(seed)
    header = 8 + int.from_bytes(whole[:8], "little")
    count = 0
    for _ in range(60):
        data = bytearray(whole)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randint(1, 3)):
                data[rng.randrange(header)] = rng.randrange(256)
        (damaged / WEIGHTS).write_bytes(data)
        count += refused(damaged, sound)
    assert count > 45


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_missing_files_and_folders_in_their_place(name: str, damaged: Path, sound: Tensors) -> None:
    (damaged / name).unlink()
    assert refused(damaged, sound)
    (damaged / name).mkdir()
    assert refused(damaged, sound)


def test_inspect_and_verify_refuse_the_same(damaged: Path) -> None:
    tensors = load_file(damaged / WEIGHTS)
    for name in NAMES:
        save_file({n: t for n, t in tensors.items() if n != name}, damaged / WEIGHTS)
        for command in (inspect_checkpoint, verify_checkpoint):
            with pytest.raises(CheckpointError, match=rf"1 missing: {name}"):
                command(damaged)
