"""Published Nunchaku checkpoints: every container, both dialects, strictly; and what is no checkpoint is refused."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flux_models import inputs, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support import DATA, relative_error
from tonfa.errors import CheckpointError
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel

TINY = DATA / "svdq-int4_r32-tiny.safetensors"
"""Two double and two single blocks of 256 channels, packed by the published writer."""

V2_SINGLE = (
    ("qkv_proj", "attn.to_qkv"),
    ("out_proj", "attn.to_out"),
    ("norm_q", "attn.norm_q"),
    ("norm_k", "attn.norm_k"),
)
V2_DOUBLE = (
    ("mlp_context_fc1", "ff_context.net.0.proj"),
    ("mlp_context_fc2", "ff_context.net.2"),
    ("mlp_fc1", "ff.net.0.proj"),
    ("mlp_fc2", "ff.net.2"),
    ("qkv_proj_context", "attn.add_qkv_proj"),
    ("qkv_proj", "attn.to_qkv"),
    ("norm_q", "attn.norm_q"),
    ("norm_k", "attn.norm_k"),
    ("norm_added_q", "attn.norm_added_q"),
    ("norm_added_k", "attn.norm_added_k"),
    ("out_proj_context", "attn.to_add_out"),
    ("out_proj", "attn.to_out.0"),
)
V2_FIELDS = (
    ("smooth_orig", "smooth_factor_orig"),
    ("smooth", "smooth_factor"),
    ("lora_down", "proj_down"),
    ("lora_up", "proj_up"),
)


def metadata() -> dict[str, str]:
    with safe_open(TINY, "pt") as file:
        return dict(file.metadata())


def to_v2(name: str) -> str:
    parts = name.split(".")
    table = {"single_transformer_blocks": V2_SINGLE, "transformer_blocks": V2_DOUBLE}.get(parts[0], ())
    if table:
        parts[2] = dict(table).get(parts[2], parts[2])
        parts[-1] = dict(V2_FIELDS).get(parts[-1], parts[-1])
    return ".".join(parts)


def legacy_folder(folder: Path) -> Path:
    folder.mkdir()
    tensors = load_file(TINY)
    blocks = {n: t for n, t in tensors.items() if n.split(".")[0].endswith("transformer_blocks")}
    save_file(blocks, folder / "transformer_blocks.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in blocks}, folder / "unquantized_layers.safetensors")
    (folder / "config.json").write_text(metadata()["config"])
    return folder


def load(path: Path, **options: object) -> SVDQFluxTransformer2DModel:
    return SVDQFluxTransformer2DModel.from_pretrained(path, **options)


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())


@pytest.fixture(scope="module")
def model() -> SVDQFluxTransformer2DModel:
    return load(TINY)


def test_every_container_and_dialect_gives_the_same_model(model: SVDQFluxTransformer2DModel, tmp_path: Path) -> None:
    save_file({to_v2(n): t for n, t in load_file(TINY).items()}, tmp_path / "v2.safetensors", metadata())
    without = {n: t for n, t in load_file(TINY).items() if not n.endswith(".smooth_orig")}
    save_file(without, tmp_path / "old.safetensors", metadata())
    model.save_pretrained(tmp_path / "native")
    for path in (legacy_folder(tmp_path / "legacy"), tmp_path / "v2.safetensors", tmp_path / "old.safetensors"):
        assert equal(load(path), model), path
    assert equal(load(tmp_path / "native"), model)
    assert model.config.num_layers == 2
    assert model.config.quantization_config["rank"] == 32


def test_it_computes_what_the_dense_model_does(model: SVDQFluxTransformer2DModel) -> None:
    """`tiny_dense_output` is the original 16-bit model's output on `inputs`, in float32, by Diffusers."""
    golden = load_file(DATA / "tiny_dense_output.safetensors")["sample"]
    values = inputs(model, 2, dtype=torch.bfloat16)
    for activations, bound in (("none", 2e-2), ("int8", 2e-2), ("int4", 2e-2)):
        assert relative_error(run(model.set_activations(activations), values), golden) < bound
    model.set_activations(None)


def test_padded_scale_rows_of_small_modulations(model: SVDQFluxTransformer2DModel, tmp_path: Path) -> None:
    """The writer pads a modulation's groups to a multiple of 16; the rows beyond K / 64 mean nothing."""
    tensors = load_file(TINY)
    for name, tensor in tensors.items():
        if "norm" in name and name.endswith((".wscales", ".wzeros")):
            tensors[name] = torch.cat([tensor, torch.full((16 - len(tensor), tensor.shape[1]), 9.0).bfloat16()])
    save_file(tensors, tmp_path / "padded.safetensors", metadata())
    assert equal(load(tmp_path / "padded.safetensors"), model)


NAME = "single_transformer_blocks.1.mlp_fc2.wscales"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(NAME), "missing"),
        (lambda t: t.pop("proj_out.bias"), r"missing: proj_out\.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda t: t.update({NAME: t[NAME][:, :-1].clone()}), "of another shape"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int8)}), "dtype"),
        (lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}), "NVFP4"),
        (lambda t: t.update({NAME.replace("wscales", "lora_up"): torch.zeros(256, 16).bfloat16()}), "another shape"),
        (lambda t: t.update({NAME.replace("wscales", "lora_down"): torch.zeros(1024, 16).bfloat16()}), "ranks"),
        (lambda t: [t.pop(n) for n in list(t) if "lora" in n], "no low-rank branches"),
        (lambda t: t[NAME].view(-1)[7].fill_(float("nan")), r"ff\.down\.wscales holds NaN or Inf"),
        (lambda t: t["proj_out.weight"].view(-1)[7].fill_(float("inf")), r"proj_out\.weight holds NaN or Inf"),
    ],
)
def test_wrong_tensors_are_refused_by_name(change: Callable[[dict], object], message: str, tmp_path: Path) -> None:
    tensors = load_file(TINY)
    change(tensors)
    save_file(tensors, tmp_path / "wrong.safetensors", metadata())
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "wrong.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": None}, "no 'config' in its metadata"),
        ({"config": "{"}, "no JSON"),
        ({"config": "[1]"}, "expected a JSON object, got list"),
        ({"config": '{"num_layers": -1}'}, "num_layers is -1"),
        ({"config": '{"num_layers": 1e9}'}, "num_layers is"),
        ({"config": '{"num_layers": 99999999999}'}, "expected an integer of 0 to 256"),
        ({"config": '{"num_layers": 2, "surprise": 1}'}, "surprise"),
        ({"quantization_config": '{"weight": {"dtype": "fp4_e2m1_all"}}'}, "take the INT4 checkpoint"),
        ({"quantization_config": "nonsense"}, "no JSON"),
    ],
)
def test_wrong_metadata_is_refused(change: dict[str, str | None], message: str, tmp_path: Path) -> None:
    kept = {k: v for k, v in {**metadata(), **change}.items() if v is not None}
    save_file(load_file(TINY), tmp_path / "wrong.safetensors", kept)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "wrong.safetensors")


def test_incomplete_legacy_folders(tmp_path: Path) -> None:
    for missing in ("transformer_blocks.safetensors", "unquantized_layers.safetensors", "config.json"):
        folder = legacy_folder(tmp_path / missing)
        (folder / missing).unlink()
        with pytest.raises(CheckpointError, match=missing):
            load(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "nothing.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.safetensors"):
        load(tmp_path / "folder.safetensors")
    (tmp_path / "empty.safetensors").touch()
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load(tmp_path / "empty.safetensors")
    with zipfile.ZipFile(tmp_path / "zip.safetensors", "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02")
    with pytest.raises(CheckpointError, match="zip archive"):
        load(tmp_path / "zip.safetensors")


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid checkpoint small enough to be damaged a few thousand times: no blocks but one of each kind."""
    config = {**json.loads(metadata()["config"]), "num_layers": 1, "num_single_layers": 1}
    kept = {n: t for n, t in load_file(TINY).items() if ".1." not in n or not n.split(".")[0].endswith("blocks")}
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    save_file(kept, path, {**metadata(), "config": json.dumps(config)})
    load(path)
    return path.read_bytes()


@pytest.mark.parametrize("seed", range(8))
def test_damaged_files_raise_one_clear_error(small_file: bytes, seed: int, tmp_path: Path) -> None:
    """Truncated anywhere, or a header byte changed: refused, or read as the very same names, shapes and dtypes."""
    rng = random.Random(seed)
    header = 8 + int.from_bytes(small_file[:8], "little")
    path = tmp_path / "damaged.safetensors"
    refused = 0
    for _ in range(260):
        damaged = bytearray(small_file)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            load(path)
        except CheckpointError as error:
            assert str(path) in str(error) or "config.json" in str(error)
            refused += 1
    assert refused > 200
