"""`tonfa generate`: pictures of tiny pipelines, in 16 and in 4 bits; refusals come before anything is loaded."""

from __future__ import annotations

import json
import logging.handlers
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tonfa.cli.images import nearest_multiple, open_image, output_paths, write_image
from tonfa.cli.pipeline import StepClock
from tonfa.errors import CheckpointError, FormatError, TonfaError, UnsupportedError

SHORT = ("--steps", 2, "--max-sequence-length", 16, "--device", "cpu")


@pytest.fixture
def never_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("loaded before the arguments were checked")

    monkeypatch.setattr("tonfa.cli.pipeline.load", load)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.asarray(image)


def test_picture_with_a_4_bit_transformer(
    tonfa, depth_pipeline: Path, checkpoint: Path, depth_map: Path, tmp_path: Path
) -> None:
    command = ("generate", depth_pipeline, "--transformer", checkpoint, "--prompt", "a red cat", *SHORT)
    command = (*command, "--control-image", depth_map, "--activations", "int8")
    results = [tonfa(*command, "--output", tmp_path / f"{i}.png") for i in range(2)]
    assert [r.exit_code for r in results] == [0, 0], results[0].output
    assert results[0].stdout == f"{tmp_path / '0.png'}\n"
    assert "4-bit weights and a rank-32 branch, int8 activations, sdpa attention" in results[0].stderr
    assert "FluxControlPipeline" in results[0].stderr and "a step" in results[0].stderr
    picture = pixels(tmp_path / "0.png")
    assert picture.shape == (48, 64, 3) and picture.std() > 1
    assert (picture == pixels(tmp_path / "1.png")).all()
    dense = tonfa(*command[:2], *command[4:-2], "--output", tmp_path / "dense.png")
    assert dense.exit_code == 0, dense.stderr
    assert "bfloat16, not quantized" in dense.stderr
    difference = np.abs(pixels(tmp_path / "dense.png").astype(int) - picture).mean()
    assert 0 < difference < 0.2 * picture.std()


def test_a_nunchaku_file_or_folder_gives_the_same_picture(
    tonfa, depth_pipeline: Path, checkpoint: Path, depth_map: Path, tmp_path: Path
) -> None:
    assert tonfa("convert", checkpoint, tmp_path / "t.safetensors", "--to", "nunchaku").exit_code == 0
    assert tonfa("convert", checkpoint, tmp_path / "folder", "--to", "nunchaku-folder").exit_code == 0
    pictures = []
    for i, transformer in enumerate((checkpoint, tmp_path / "t.safetensors", tmp_path / "folder")):
        out = tmp_path / f"{i}.png"
        command = ("generate", depth_pipeline, "--transformer", transformer, "--prompt", "a red cat", *SHORT)
        result = tonfa(*command, "--control-image", depth_map, "--activations", "int8", "--output", out)
        assert result.exit_code == 0, result.stderr
        pictures.append(pixels(out))
    assert (pictures[1] == pictures[0]).all() and (pictures[2] == pictures[0]).all()


def test_a_pipeline_with_diffusers_4_bit_transformer(
    tonfa, depth_pipeline: Path, checkpoint: Path, depth_map: Path, tmp_path: Path
) -> None:
    pipeline = tmp_path / "pipeline"
    shutil.copytree(depth_pipeline, pipeline)
    shutil.rmtree(pipeline / "transformer")
    assert tonfa("convert", checkpoint, pipeline / "transformer", "--to", "nunchaku-lite").exit_code == 0
    command = ("-p", "cat", *SHORT, "--control-image", depth_map, "--activations", "int8")
    own = tonfa("generate", pipeline, *command, "--output", tmp_path / "own.png")
    assert own.exit_code == 0, own.output
    assert "4-bit weights and a rank-64 branch, int8 activations" in own.stderr
    given = ("generate", depth_pipeline, "--transformer", pipeline / "transformer", *command)
    assert tonfa(*given, "--output", tmp_path / "given.png").exit_code == 0
    native = ("generate", depth_pipeline, "--transformer", checkpoint, *command)
    assert tonfa(*native, "--output", tmp_path / "native.png").exit_code == 0
    own_pixels, others = pixels(tmp_path / "own.png"), pixels(tmp_path / "native.png")
    assert (own_pixels == pixels(tmp_path / "given.png")).all()
    assert np.abs(own_pixels.astype(int) - others).mean() < 0.05 * others.std()


def test_the_picture_is_that_of_the_library(tonfa, depth_pipeline: Path, depth_map: Path, tmp_path: Path) -> None:
    from diffusers import FluxControlPipeline

    result = tonfa(
        "generate", depth_pipeline, "-p", "cat", *SHORT, "--control-image", depth_map, "--seed", 5,
        "--guidance", 4, "--output", tmp_path / "cat.png", "--quiet",
    )  # fmt: skip
    assert (result.exit_code, result.stderr) == (0, "")
    pipe = FluxControlPipeline.from_pretrained(depth_pipeline, dtype=torch.bfloat16)
    expected = pipe(
        prompt="cat",
        control_image=Image.open(depth_map).convert("RGB"),
        height=48,
        width=64,
        num_inference_steps=2,
        guidance_scale=4.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert (pixels(tmp_path / "cat.png") == np.asarray(expected)).all()


def test_text_to_image_batches_equal_singles(tonfa, text_pipeline: Path, tmp_path: Path) -> None:
    size = ("--height", 32, "--width", 48, "--dtype", "float32")
    command = ("generate", text_pipeline, "-p", "cat", *SHORT, *size)
    batched = tonfa(*command, "--num-images", 3, "--batch-size", 2, "--seed", 7, "-o", tmp_path / "batched")
    assert batched.exit_code == 0, batched.output
    assert batched.stdout.split() == [str(tmp_path / "batched" / f"image-{i}.png") for i in range(3)]
    assert "3 pictures in" in batched.stderr
    for i in range(3):
        single = tonfa(*command, "--seed", 7 + i, "-o", tmp_path / f"single-{i}.png")
        assert single.exit_code == 0
        difference = pixels(tmp_path / f"single-{i}.png").astype(int) - pixels(tmp_path / "batched" / f"image-{i}.png")
        assert np.abs(difference).max() <= 1
    assert (pixels(tmp_path / "single-0.png") != pixels(tmp_path / "single-1.png")).any()


def test_saved_pipeline_with_a_4_bit_transformer(
    tonfa, depth_pipeline: Path, checkpoint: Path, depth_map: Path, tmp_path: Path
) -> None:
    from diffusers import FluxControlPipeline

    from tonfa import SVDQFluxTransformer2DModel

    transformer = SVDQFluxTransformer2DModel.from_pretrained(checkpoint)
    FluxControlPipeline.from_pretrained(depth_pipeline, transformer=transformer).save_pretrained(tmp_path / "saved")
    command = ("-p", "cat", "--control-image", depth_map, *SHORT)
    saved = tonfa("generate", tmp_path / "saved", *command, "-o", tmp_path / "a.png")
    assert saved.exit_code == 0, saved.output
    named = tonfa("generate", depth_pipeline, "--transformer", checkpoint, *command, "-o", tmp_path / "b.png")
    assert named.exit_code == 0
    assert (pixels(tmp_path / "a.png") == pixels(tmp_path / "b.png")).all()


def test_depth_of_a_photograph(tonfa, depth_pipeline: Path, depth_model: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((70, 45))
    photo.save(tmp_path / "photo.jpg")
    command = ("generate", depth_pipeline, "-p", "cat", *SHORT, "--image", tmp_path / "photo.jpg")
    result = tonfa(*command, "--depth-model", depth_model, "-o", tmp_path / "out.webp")
    assert result.exit_code == 0, result.output
    assert "the control image is 70 x 45: it is scaled to 64 x 48" in result.stderr
    assert f"depth        {depth_model}" in result.stderr
    assert pixels(tmp_path / "out.webp").shape == (48, 64, 3)
    missing = tonfa(*command, "--depth-model", tmp_path / "nowhere")
    assert missing.exit_code == 1 and "depth model: no folder" in missing.stderr


def test_pictures_that_are_finished_are_kept(
    tonfa, text_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    original = StepClock.__call__

    def stop_in_the_second(self: StepClock, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(StepClock, "__call__", stop_in_the_second)
    size = ("--height", 32, "--width", 32, "--num-images", 2)
    result = tonfa("generate", text_pipeline, "-p", "cat", *SHORT, *size, "-o", tmp_path / "o.png")
    assert result.exit_code == 130 and "pictures that were finished are kept" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["o-0.png"]
    assert pixels(tmp_path / "o-0.png").shape == (32, 32, 3)


@pytest.mark.usefixtures("never_load")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", " "), "the prompt is empty"),
        (("--steps", 0), "--steps"),
        (("--height", 100), "100 is no positive multiple of 16; the nearest is 96"),
        (("--width", 0), "0 is no positive multiple of 16"),
        (("--width", -16), "-16 is no positive multiple of 16"),
        (("--num-images", 0), "--num-images"),
        (("--batch-size", 0), "--batch-size"),
        (("--seed", -1), "--seed"),
        (("--seed", 2**63), "seeds are below 2**63"),
        (("--max-sequence-length", 513), "--max-sequence-length"),
        (("--guidance", -1), "--guidance"),
        (("--guidance", "inf"), "--guidance"),
        (("--height", 16_016), "16016 is too large: at most 16000 pixels a side"),
        (("--width", 10**30), "is too large: at most 16000 pixels a side"),
        (("--dtype", "float8"), "'float8' is not one of"),
        (("--activations", "int3"), "'int3' is not one of"),
        (("--device", "tpu"), "'tpu' is none of"),
        (("--offload", "--device", "cpu"), "nothing to offload to from cpu"),
        (("--output", "picture.txt"), "the name must end with one of .png"),
        (("--image", "photo.jpg"), "give one of them"),
        (("--activations", "int8"), "the transformer is not quantized"),
    ],
)
def test_wrong_usage(
    tonfa,
    depth_pipeline: Path,
    depth_map: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = tonfa("generate", depth_pipeline, "-p", "cat", "--control-image", depth_map, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split()), result.stderr
    assert result.stdout == ""


@pytest.mark.usefixtures("never_load")
def test_control_images_where_they_belong(
    tonfa, depth_pipeline: Path, text_pipeline: Path, checkpoint: Path, depth_map: Path, tmp_path: Path
) -> None:
    out = ("-o", tmp_path / "o.png")
    missing = tonfa("generate", depth_pipeline, "-p", "cat", *out)
    assert missing.exit_code == 2 and "control model" in missing.stderr
    replaced = tonfa("generate", text_pipeline, "--transformer", checkpoint, "-p", "cat", *out)
    assert replaced.exit_code == 2 and "control model" in replaced.stderr
    useless = tonfa("generate", text_pipeline, "-p", "cat", "--control-image", depth_map, *out)
    assert useless.exit_code == 2 and "reads no control image" in useless.stderr


@pytest.mark.usefixtures("never_load")
@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        ("nowhere", {}, "there is no folder nowhere"),
        ("org/nowhere", {}, "the Hub cannot be reached"),
        ("file", {}, "file is a file; expected a folder"),
        ("empty", {}, "has no model_index.json"),
        ("other", {"model_index.json": {"transformer": ["diffusers", "SD3Transformer2DModel"]}}, "no FLUX model"),
        ("unet", {"model_index.json": {"unet": ["diffusers", "UNet2DConditionModel"]}}, "no FLUX model"),
        ("bare", {"model_index.json": {"transformer": ["diffusers", "FluxTransformer2DModel"]}}, "no config.json"),
        (
            "fill",
            {
                "model_index.json": {"transformer": ["diffusers", "FluxTransformer2DModel"]},
                "transformer/config.json": {"in_channels": 384, "out_channels": 64},
            },
            "reads 384 channels and writes 64",
        ),
        (
            "text",
            {
                "model_index.json": {"transformer": ["diffusers", "FluxTransformer2DModel"]},
                "transformer/config.json": {"in_channels": "many"},
            },
            "the transformer's config.json: in_channels is 'many', expected an integer",
        ),
    ],
)
def test_what_is_no_model(
    tonfa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("empty").mkdir()
    for name, content in change.items():
        file = Path(model, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    result = tonfa("generate", model, "-p", "cat")
    assert result.exit_code == 1 and message in result.stderr, result.output
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("never_load")
def test_bad_control_images(tonfa, depth_pipeline: Path, depth_map: Path, tmp_path: Path) -> None:
    def run(path: Path) -> str:
        result = tonfa("generate", depth_pipeline, "-p", "cat", "--control-image", path, "-o", tmp_path / "o.png")
        assert result.exit_code == 1 and result.stdout == ""
        return result.stderr

    assert f"--control-image: {tmp_path / 'missing.png'}: no such file" in run(tmp_path / "missing.png")
    assert f"--control-image: {tmp_path}: is no file but a folder" in run(tmp_path)
    assert "cannot be read: File name too long" in run(tmp_path / f"{'n' * 300}.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "is no picture in a known format" in run(tmp_path / "text.png")
    (tmp_path / "cut.png").write_bytes(depth_map.read_bytes()[:-60])
    assert "is damaged" in run(tmp_path / "cut.png")
    Image.fromarray(np.full((16, 16), 255, np.float32)).save(tmp_path / "floats.tif")
    assert f"--control-image: {tmp_path / 'floats.tif'}: an image of floats must lie" in run(tmp_path / "floats.tif")
    Image.fromarray(np.full((16, 16), 70_000, np.int32)).save(tmp_path / "deep.tif")
    assert "deep.tif: an image of integers from 70000 to 70000" in run(tmp_path / "deep.tif")


def test_missing_gpu_and_backend(tonfa, depth_pipeline: Path, depth_map: Path, tmp_path: Path) -> None:
    command = ("generate", depth_pipeline, "-p", "cat", "--control-image", depth_map, "-o", tmp_path / "o.png")
    assert "--device cuda:77" in tonfa(*command, "--device", "cuda:77").stderr
    damaged = tonfa(*command, "--transformer", depth_pipeline / "transformer")
    assert damaged.exit_code == 1 and "not quantized" in damaged.stderr
    whole = tonfa(*command, "--transformer", depth_pipeline)
    assert whole.exit_code == 1 and f"give {depth_pipeline / 'transformer'}" in whole.stderr


def test_the_depth_model_is_that_of_the_preprocessor() -> None:
    import inspect

    from tonfa.cli.generate import generate
    from tonfa.preprocess import DEPTH_MODEL

    assert inspect.signature(generate).parameters["depth_model"].default == DEPTH_MODEL


def test_images_are_opened_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 4), "red")
    image.getexif()[0x0112] = 6  # rotated by a quarter turn
    image.save(tmp_path / "turned.jpg", exif=image.getexif())
    assert open_image(tmp_path / "turned.jpg", "--image").size == (4, 8)
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    opened = np.asarray(open_image(tmp_path / "deep.png", "--image"))
    assert np.abs(opened[..., 0] - deep / 257).max() <= 0.5
    with pytest.raises(CheckpointError, match="--image: .*is no file but a folder"):
        open_image(tmp_path, "--image")


def test_sizes() -> None:
    assert [nearest_multiple(n) for n in (1, 16, 23, 24, 1000, 1024)] == [16, 16, 16, 32, 1008, 1024]


def test_output_names(tmp_path: Path) -> None:
    assert output_paths(tmp_path / "a.png", 1) == [tmp_path / "a.png"]
    assert output_paths(tmp_path / "a.b.jpg", 2) == [tmp_path / "a.b-0.jpg", tmp_path / "a.b-1.jpg"]
    assert output_paths(tmp_path / "new" / "folder", 1) == [tmp_path / "new" / "folder" / "image.png"]
    assert output_paths(f"{tmp_path}/v1.5/", 1) == [tmp_path / "v1.5" / "image.png"]
    assert list(tmp_path.iterdir()) == []  # the folder comes with the first picture
    (tmp_path / "v2.0").mkdir()
    assert output_paths(tmp_path / "v2.0", 1) == [tmp_path / "v2.0" / "image.png"]
    (tmp_path / "file").write_text("x")
    for under in ("file/a.png", "file/new/a.png", "file/"):
        with pytest.raises(UnsupportedError, match=f"--output: {tmp_path / 'file'} is no folder"):
            output_paths(f"{tmp_path}/{under}", 1)


def test_what_cannot_be_written_is_said_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v2" / "image-1.png").mkdir(parents=True)
    with pytest.raises(UnsupportedError, match=r"image-1\.png is a folder, and a picture"):
        output_paths(tmp_path / "v2", 2)
    with pytest.raises(UnsupportedError, match="File name too long"):
        output_paths(tmp_path / f"{'n' * 249}.png", 11)  # one digit fits, two do not
    assert len(output_paths(tmp_path / f"{'n' * 249}.png", 10)) == 10

    def read_only(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("tempfile.TemporaryFile", read_only)  # root may write everywhere
    with pytest.raises(UnsupportedError, match=f"the folder {tmp_path} cannot be written to: Read-only file system"):
        output_paths(tmp_path / "new" / "a.png", 1)


def test_a_picture_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (8, 8), "blue")
    write_image(image, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def fail(self: Image.Image, path: Path, **kwargs: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(CheckpointError, match=r"a\.png: no space left on the disk"):
        write_image(image, tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_picture_has_any_name_that_a_file_can_have(tmp_path: Path) -> None:
    path = tmp_path / "new" / f"{'n' * 251}.png"
    write_image(Image.new("RGB", (8, 8), "blue"), path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert (pixels(path) == (0, 0, 255)).all()


def test_a_failure_leaves_no_folder(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    command = ("generate", depth_pipeline, "-p", "cat", "--control-image", tmp_path / "missing.png")
    assert tonfa(*command, "-o", tmp_path / "new" / "folder").exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_control_image_too_large_to_draw(tonfa, depth_pipeline: Path, checkpoint: Path, tmp_path: Path) -> None:
    Image.new("L", (20_000, 16)).save(tmp_path / "wide.png")
    command = ("generate", depth_pipeline, "--transformer", checkpoint, "-p", "cat", *SHORT, "-o", tmp_path / "o.png")
    refused = tonfa(*command, "--control-image", tmp_path / "wide.png")
    assert refused.exit_code == 1 and "choose a size with --width and --height" in refused.stderr
    drawn = tonfa(*command, "--control-image", tmp_path / "wide.png", "--width", 32)
    assert drawn.exit_code == 0 and pixels(tmp_path / "o.png").shape == (16, 32, 3)


def test_no_memory_to_draw(
    tonfa, depth_pipeline: Path, checkpoint: Path, depth_map: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("tonfa.cli.pipeline.draw", full)
    command = ("generate", depth_pipeline, "--transformer", checkpoint, "-p", "cat", "--control-image", depth_map)
    result = tonfa(*command, *SHORT, "-o", tmp_path / "o.png")
    assert result.exit_code == 1
    assert "error: out of memory while drawing 64 x 48 pixels; draw smaller with --width" in result.stderr


def test_float16_on_a_cpu_draws_without_warnings(
    tonfa, depth_pipeline: Path, checkpoint: Path, depth_map: Path, tmp_path: Path
) -> None:
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("diffusers").addHandler(said)
    try:
        command = ("generate", depth_pipeline, "--transformer", checkpoint, "-p", "cat", *SHORT, "--dtype", "float16")
        result = tonfa(*command, "-o", tmp_path / "o.png", "--control-image", depth_map)
    finally:
        logging.getLogger("diffusers").removeHandler(said)
    assert result.exit_code == 0 and "device       cpu, float16" in result.stderr
    assert [record.getMessage() for record in said.buffer] == []
    assert pixels(tmp_path / "o.png").std() > 1


def test_nan_is_an_error_that_names_the_step() -> None:
    clock = StepClock(lambda: None)
    good, bad = torch.zeros(1, 4, 64), torch.full((1, 4, 64), float("nan"))
    assert clock(None, 0, None, {"latents": good}) == {"latents": good}
    with pytest.raises(FormatError, match="step 2: the latents hold NaN or Inf"):
        clock(None, 1, None, {"latents": bad})
    assert len(clock.seconds) == 1 and clock.median == clock.seconds[0]
    assert issubclass(FormatError, TonfaError)


@pytest.mark.usefixtures("never_load")
def test_attention_that_cannot_run_is_refused_first(tonfa, depth_pipeline: Path, depth_map: Path) -> None:
    command = ("generate", depth_pipeline, "--prompt", "a cat", *SHORT, "--control-image", depth_map)
    result = tonfa(*command, "--attention", "fp8")
    assert result.exit_code == 1
    assert "attention='fp8' does not run on cpu" in result.stderr
    assert tonfa(*command, "--attention", "fp4").exit_code == 2
