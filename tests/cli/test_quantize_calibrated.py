"""`tonfa quantize --calibrate`: nearer to the 16-bit model than without, resumable, and clear about bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from tonfa.cli import calibration as cli
from tonfa.models.flux import calibration as flux_calibration
from tonfa.models.flux.sampling import Picture, Schedule, draw
from tonfa.quantizer import build, learned, smoothing
from tonfa.quantizer.samples import Samples

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = ("--size", 128, "--steps", 4, "--samples", 32, "--rank", 16)
"""The least that the tiny model needs: 64 image tokens a sample, 2048 for its widest input of 512 channels."""


@pytest.fixture(scope="module", autouse=True)
def short_searches() -> Iterator[None]:
    """A tenth of the published grid and of the learning: what is tested here is not how good they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smoothing, "GRID", 4)
        patch.setattr(learned, "STEPS", 5)
        yield


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(f"prompt {i} about {word}" for i, word in enumerate("abcdefgh")) + "\n\n")
    return path


def held_out(pipeline: Path, folder: Path, *, control: bool) -> list[dict[str, Tensor]]:
    """The transformer's inputs in a picture that no calibration drew."""
    from diffusers import FluxControlPipeline, FluxPipeline

    pipe = (FluxControlPipeline if control else FluxPipeline).from_pretrained(pipeline, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    levels = np.tile(np.linspace(0, 255, 128).astype(np.uint8), (128, 1))
    image = Image.fromarray(levels).convert("RGB") if control else None
    samples = Samples(folder, 4)
    picture = Picture("something else entirely", image, 128, 128, 987, (0, 1, 2, 3), 0)
    draw(pipe, picture, Schedule(4, 10.0 if control else 3.5, 512), samples, lambda: None)
    return [samples.read(i) for i in range(4)]


@torch.no_grad()
def velocity_error(checkpoint: Path, pipeline: Path, inputs: list[dict[str, Tensor]], activations: str) -> float:
    from diffusers import FluxTransformer2DModel

    from tonfa import SVDQFluxTransformer2DModel

    dense = FluxTransformer2DModel.from_pretrained(pipeline / "transformer", dtype=torch.float32)
    model = SVDQFluxTransformer2DModel.from_pretrained(checkpoint, dtype=torch.float32, activations=activations)
    wrong = total = 0.0
    for call in inputs:
        call = {name: t.float() for name, t in call.items()}
        expected = dense(**call, return_dict=False)[0]
        found = model(**call, return_dict=False)[0]
        wrong += float((found - expected).square().sum())
        total += float(expected.square().sum())
    return (wrong / total) ** 0.5


@pytest.fixture(scope="module")
def made(depth_pipeline: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of the depth pipeline by what was asked for."""
    from typer.testing import CliRunner

    from tonfa.cli.app import app

    folder = tmp_path_factory.mktemp("made")
    calibrated = ("--calibrate", prompts, "--control-images", "default", *SMALL)
    commands: dict[str, tuple[Any, ...]] = {
        "data-free": ("--rank", 16),
        "tonfa": calibrated,
        "sequential": (*calibrated, "--sequential"),
        "svdquant": (*calibrated, "--recipe", "svdquant"),
    }
    for name, options in commands.items():
        arguments = ["quantize", str(depth_pipeline), "--out", str(folder / name), *map(str, options)]
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400"})
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{folder / name}\n"
    return {name: folder / name for name in commands}


def test_calibrated_is_nearer(made: dict[str, Path], depth_pipeline: Path, tmp_path: Path) -> None:
    inputs = held_out(depth_pipeline, tmp_path / "held-out", control=True)
    error = {name: velocity_error(path, depth_pipeline, inputs, "int4") for name, path in made.items()}
    assert error["tonfa"] < 0.9 * error["data-free"]
    assert error["sequential"] < 0.9 * error["data-free"]
    assert error["tonfa"] < error["svdquant"] < 1
    assert error["sequential"] != error["tonfa"]
    without = velocity_error(made["tonfa"], depth_pipeline, inputs, "none")
    assert without < velocity_error(made["data-free"], depth_pipeline, inputs, "none")


def test_what_the_checkpoint_says_of_itself(made: dict[str, Path]) -> None:
    recipe = json.loads((made["sequential"] / "config.json").read_text())["quantization_config"]["recipe"]
    calibration = recipe["calibration"]
    assert calibration["samples"] == 32 and calibration["sizes"] == ["128x128"] and calibration["sequential"] is True
    assert calibration["steps"] == 4 and calibration["guidance"] == 10.0 and recipe["activations"] == "int4"
    assert recipe["method"] == "tonfa"
    free = json.loads((made["data-free"] / "config.json").read_text())["quantization_config"]["recipe"]
    assert "calibration" not in free


def test_linears_that_share_an_input_share_smoothing(made: dict[str, Path]) -> None:
    name = "single_transformer_blocks.0"
    for recipe in ("tonfa", "svdquant"):
        tensors = load_file(made[recipe] / WEIGHTS)
        qkv, up = (tensors[f"{name}.{linear}.smooth_factor"] for linear in ("attn.to_qkv", "ff.up"))
        assert torch.equal(qkv, up)
        assert not torch.equal(qkv, torch.ones_like(qkv))


def test_calibrated_draws_and_converts(
    tonfa, made: dict[str, Path], depth_pipeline: Path, depth_map: Path, tmp_path: Path
) -> None:
    options = ("--prompt", "a cat", "--control-image", depth_map, "--steps", 2, "--output", tmp_path / "cat.png")
    result = tonfa("generate", depth_pipeline, "--transformer", made["tonfa"], *options)
    assert result.exit_code == 0, result.stderr
    with Image.open(tmp_path / "cat.png") as drawn:
        assert drawn.size == (64, 48)
    file = tmp_path / "q.safetensors"
    assert tonfa("convert", made["tonfa"], file, "--to", "nunchaku").exit_code == 0
    assert tonfa("convert", file, tmp_path / "back", "--to", "native").exit_code == 0
    before, after = load_file(made["tonfa"] / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key
    assert tonfa("verify", made["tonfa"], "--against", depth_pipeline).exit_code == 0


@pytest.mark.parametrize(
    ("stage", "order"), [("sampling", ()), ("first linear", ()), ("last linear", ("--sequential",))]
)
def test_interrupted_then_repeated(
    tonfa,
    made: dict[str, Path],
    depth_pipeline: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    order: tuple[str, ...],
) -> None:
    out = tmp_path / "q"
    command = ("quantize", depth_pipeline, "--out", out, "--calibrate", prompts, "--control-images", "default")
    command = (*command, *SMALL, *order)
    drawn: list[Picture] = []
    original_draw, original_quantize = flux_calibration.draw, build.quantize_planned

    def counted(pipe: Any, picture: Picture, *rest: Any) -> None:
        drawn.append(picture)
        if stage == "sampling" and len(drawn) == 4:
            raise KeyboardInterrupt
        original_draw(pipe, picture, *rest)

    def stopped(linear: Any, *arguments: Any) -> Any:
        if stage == "first linear" or linear.name == "single_transformer_blocks.0.ff.down":
            raise KeyboardInterrupt
        return original_quantize(linear, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(flux_calibration, "draw", counted)
        patch.setattr(build, "quantize_planned", stopped)
        result = tonfa(*command)
    assert result.exit_code == 130 and "run the same command again" in result.stderr
    assert not out.exists()
    before = len(drawn)
    drawn.clear()
    stage = "over"
    monkeypatch.setattr(flux_calibration, "draw", counted)
    again = tonfa(*command)
    assert again.exit_code == 0, again.output
    assert len(drawn) == (5 if before == 4 else 0)
    expected = made["sequential" if order else "tonfa"]
    assert (out / WEIGHTS).read_bytes() == (expected / WEIGHTS).read_bytes()
    assert not out.with_name("q.partial").exists()


def test_other_settings_do_not_continue_a_run(
    tonfa, depth_pipeline: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("quantize", depth_pipeline, "--out", tmp_path / "q", "--control-images", "default", *SMALL)

    def stopped(linear: Any, *_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "quantize_planned", stopped)
        assert tonfa(*command, "--calibrate", prompts).exit_code == 130
    other = tmp_path / "other.txt"
    other.write_text(prompts.read_text().replace("about", "without"))
    for options, changed in (
        (("--calibrate", other), "calibration prompts"),
        (("--calibrate", prompts, "--sequential"), "calibration sequential"),
        (("--calibrate", prompts, "--guidance", 3), "calibration guidance"),
        (("--calibrate", prompts, "--activations", "int8"), "recipe"),
    ):
        refused = tonfa(*command, *options)
        assert refused.exit_code == 1 and "an unfinished run with another" in refused.stderr, refused.output
        assert changed in refused.stderr
    free = tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", "--rank", 16)
    assert free.exit_code == 1 and "another calibration" in free.stderr


def test_text_to_image_with_the_default_captions(tonfa, text_pipeline: Path, tmp_path: Path) -> None:
    out = tmp_path / "q"
    result = tonfa("quantize", text_pipeline, "--out", out, "--calibrate", "default", *SMALL)
    assert result.exit_code == 0, result.output
    assert "32 samples" not in result.stdout and "samples    32 from 8 pictures of 4 steps, 128 x 128" in result.stderr
    assert tonfa("quantize", text_pipeline, "--out", tmp_path / "free", "--rank", 16).exit_code == 0
    inputs = held_out(text_pipeline, tmp_path / "held-out", control=False)
    calibrated = velocity_error(out, text_pipeline, inputs, "int4")
    assert calibrated < 0.9 * velocity_error(tmp_path / "free", text_pipeline, inputs, "int4")


def test_default_prompts_are_many_and_distinct() -> None:
    prompts = cli.read_prompts("default")
    assert len(prompts) == len(set(prompts)) == 512
    assert min(len(p) for p in prompts) < 30 and max(len(p) for p in prompts) > 300
    images = cli.read_control_images("default")
    assert len(images) == 24 and {image.size for image in images} == {(512, 512)}
    assert len({image.tobytes() for image in images}) == 24
    data = sum(p.stat().st_size for p in cli.DATA.rglob("*") if p.is_file())
    assert data < 400_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file"),
        (b"", "holds no prompts"),
        (b" \n\n \n", "holds no prompts"),
        (b"\xff\xfe\x00\x01", "is no UTF-8 text"),
        (b"fine\n\x00\x01\x02\n", "prompt 2 holds control characters"),
        (b"one\ntwo\n", "has 2 prompts, 32 samples take 8"),
    ],
)
def test_bad_prompts(tonfa, depth_pipeline: Path, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content)
    options = ("--calibrate", path, "--control-images", "default", *SMALL)
    result = tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", *options)
    assert result.exit_code == 1 and message in result.stderr and "Traceback" not in result.stderr, result.output
    assert not list(tmp_path.glob("q*"))


def test_too_few_samples_only_by_force(tonfa, depth_pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    options = ("--calibrate", prompts, "--control-images", "default", "--rank", 16, "--size", 128, "--steps", 2)
    few = ("quantize", depth_pipeline, "--out", tmp_path / "q", *options, "--samples", 3)
    refused = tonfa(*few)
    assert refused.exit_code == 1 and "needs at least 32 at this size" in refused.stderr and "--force" in refused.stderr
    assert not list(tmp_path.glob("q*"))
    assert tonfa(*few, "--force").exit_code == 0
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["recipe"]["calibration"]["samples"] == 3


def test_bad_control_images(tonfa, depth_pipeline: Path, text_pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    empty, words = tmp_path / "empty", tmp_path / "words"
    empty.mkdir()
    words.mkdir()
    (words / "notes.png").write_text("no picture")
    for given, code, message in (
        ((), 2, "the transformer is a control model"),
        (("--control-images", tmp_path / "none"), 1, "no folder"),
        (("--control-images", empty), 1, "is empty"),
        (("--control-images", words), 1, "notes.png: is no picture"),
    ):
        options = ("--calibrate", prompts, *SMALL, *given)
        result = tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", *options)
        assert result.exit_code == code and message in result.stderr, result.output
    options = ("--calibrate", prompts, *SMALL, "--control-images", "default")
    result = tonfa("quantize", text_pipeline, "--out", tmp_path / "q", *options)
    assert result.exit_code == 2 and "reads no control image" in result.stderr
    assert not list(tmp_path.glob("q*"))


def test_control_images_give_the_size(tonfa, depth_pipeline: Path, prompts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate(((128, 96), (100, 128))):
        Image.new("L", size, 40 * i).save(folder / f"{i}.png")
    options = ("--calibrate", prompts, "--control-images", folder, "--steps", 2, "--samples", 4, "--rank", 16)
    result = tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", *options, "--force")
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["recipe"]["calibration"]["sizes"] == ["128x96", "96x128"]


def test_what_belongs_together(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "q")
    for option in (
        ("--samples", 8),
        ("--sequential",),
        ("--guidance", 0),
        ("--control-images", "default"),
        ("--force",),
    ):
        result = tonfa("quantize", depth_pipeline, *out, *option)
        assert result.exit_code == 2 and "belongs to --calibrate" in result.stderr
    alone = tonfa("quantize", depth_pipeline / "transformer", *out, "--calibrate", "default")
    assert alone.exit_code == 1 and "transformer alone cannot draw" in alone.stderr
    offload = tonfa("quantize", depth_pipeline, *out, "--calibrate", "default", "--device", "cpu", "--offload")
    assert offload.exit_code == 2 and "nothing to offload to" in offload.stderr
    odd = tonfa("quantize", depth_pipeline, *out, "--calibrate", "default", "--size", 100)
    assert odd.exit_code == 2 and "multiple of 16" in odd.stderr
    large = tonfa("quantize", depth_pipeline, *out, "--calibrate", "default", "--seed", 2**63)
    assert large.exit_code == 2 and "seeds are below 2**63" in large.stderr
    wide = tonfa("quantize", depth_pipeline, *out, "--calibrate", "default", *SMALL[:-1], 256)
    assert wide.exit_code == 1 and "rank 256 exceeds the smaller side" in wide.stderr
    assert not list(tmp_path.glob("q*"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer_blocks.0.ff.net.2.weight", torch.nan, r"transformer_blocks\.0\.ff\.net\.2\.weight: holds NaN"),
        ("single_transformer_blocks.0.attn.to_k.bias", torch.inf, r"attn\.to_k\.bias: holds NaN or Inf"),
        ("transformer_blocks.0.ff.net.0.proj.weight", 3e38, r"ff\.net\.0\.proj: its output holds NaN or Inf"),
    ],
)
def test_numbers_that_went_bad_are_named(
    tonfa, depth_pipeline: Path, prompts: Path, tmp_path: Path, name: str, value: float, message: str
) -> None:
    own = shutil.copytree(depth_pipeline, tmp_path / "own")
    tensors = load_file(own / "transformer" / WEIGHTS)
    tensors[name].view(-1)[:].fill_(value) if value == 3e38 else tensors[name].view(-1)[3].fill_(value)
    save_file(tensors, own / "transformer" / WEIGHTS)
    options = ("--calibrate", prompts, "--control-images", "default", *SMALL)
    result = tonfa("quantize", own, "--out", tmp_path / "q", *options)
    assert result.exit_code == 1 and re.search(message, result.stderr), result.output
    assert "Traceback" not in result.stderr and not (tmp_path / "q").exists()


FULL_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB")


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        (
            "draw",
            FULL_GPU,
            "out of GPU memory while drawing the calibration's pictures; add --offload, or lower --size",
        ),
        ("draw", MemoryError(), "out of memory while drawing the calibration's pictures; lower --size"),
        ("walk", FULL_GPU, "out of GPU memory while running transformer_blocks.0"),
        ("solve", FULL_GPU, "while solving for transformer_blocks.0.norm1.linear; choose --device cpu"),
        ("solve", MemoryError(), "while solving for transformer_blocks.0.norm1.linear; free some"),
    ],
)
def test_out_of_memory_names_stage_and_remedy(
    tonfa,
    depth_pipeline: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException,
    message: str,
) -> None:
    from tonfa.models.flux.walk import FluxWalk

    def full(*_: Any, **__: Any) -> Any:
        raise error

    target = {"draw": (flux_calibration, "draw"), "walk": (FluxWalk, "_step"), "solve": (build, "quantize_planned")}
    monkeypatch.setattr(*target[where], full)
    options = ("--calibrate", prompts, "--control-images", "default", *SMALL)
    result = tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", *options)
    assert result.exit_code == 1 and message in result.stderr, result.output
    assert not (tmp_path / "q").exists()
