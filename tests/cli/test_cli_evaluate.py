"""`tonfa evaluate`: tables, files and refusals; the figures themselves are tested in tests/evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import save_random_lpips
from tonfa.cli.evaluate_tables import short_names

SHORT = ("--steps", 2, "--max-sequence-length", 16, "--device", "cpu", "--guidance", 4)


@pytest.fixture
def prompts(depth_map: Path) -> Path:
    file = depth_map.parent / "prompts.json"
    file.write_text(json.dumps([{"prompt": "a cat", "control_image": depth_map.name}]))
    return file


@pytest.fixture
def never_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> None:
        raise AssertionError("loaded before the arguments were checked")

    monkeypatch.setattr("tonfa.cli.pipeline.assemble", load)
    monkeypatch.setattr("tonfa.cli.evaluate.load_candidate", load)


def test_figures_tables_and_sheet(tonfa, depth_pipeline: Path, checkpoint: Path, prompts: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(depth_pipeline / "transformer", damaged)
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(damaged, dtype=torch.bfloat16)
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_v.weight.mul_(4)
    model.save_pretrained(damaged)
    result = tonfa(
        "evaluate", depth_pipeline, "--transformer", checkpoint, "--transformer", damaged,
        "--transformer", depth_pipeline / "transformer", "--prompts", prompts, "--samples", 3, "--batch-size", 2,
        "--activations", "int8", *SHORT, "--json", tmp_path / "f.json", "--sheet", tmp_path / "s.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "f.json").read_text())
    int4, other, same = figures["candidates"]
    assert (figures["settings"]["height"], figures["settings"]["width"]) == (48, 64)
    assert [p["seed"] for p in figures["problems"]] == [0, 1, 2] and figures["settings"]["activations"] == "int8"
    assert same["velocity"]["overall"] == 0 < int4["velocity"]["overall"] < other["velocity"]["overall"]
    assert same["psnr"]["infinite"] == 3 and same["psnr"]["mean"] is None
    assert int4["psnr"]["mean"] > other["psnr"]["mean"] > 5
    assert max(other["layers"], key=lambda e: e["weight"])["name"] == "transformer_blocks.0.attn.to_qkv"
    assert len(int4["velocity"]["by_timestep"]) == 2 and int4["lpips"] is None and int4["adherence"] is None
    table = result.stdout
    assert f"{int4['velocity']['overall']:.4f}" in table and f"{int4['psnr']['mean']:.2f}" in table
    assert "worst layers of damaged" in table and "equal" in table
    assert "3 of 64 x 48, 2 steps" in result.stderr
    with Image.open(tmp_path / "s.png") as sheet:
        pixels = np.asarray(sheet)
    columns = 2 + 2 * 3
    assert pixels.shape[1] == columns * (64 + 8) + 8
    depth = np.asarray(Image.open(prompts.parent / "depth.png").convert("RGB"))
    assert any((pixels[y : y + 48, 8:72] == depth).all() for y in range(pixels.shape[0] - 48))


def test_with_a_reference_and_lpips_without_layers(
    tonfa, depth_pipeline: Path, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    """A saved pipeline whose own transformer is 4-bit has no reference of its own."""
    from diffusers import FluxControlPipeline

    from tonfa import SVDQFluxTransformer2DModel

    transformer = SVDQFluxTransformer2DModel.from_pretrained(checkpoint)
    saved = tmp_path / "saved"
    FluxControlPipeline.from_pretrained(depth_pipeline, transformer=transformer).save_pretrained(saved)
    command = ("evaluate", saved, "--transformer", checkpoint, "--prompts", prompts, "--no-layers", *SHORT)
    refused = tonfa(*command)
    assert refused.exit_code == 1 and "name a dense one with --reference" in refused.stderr
    backbone, heads = save_random_lpips(tmp_path)
    command = (*command, "--lpips-backbone", backbone, "--lpips-heads", heads)
    result = tonfa(*command, "--reference", depth_pipeline / "transformer", "--quiet", "--json", tmp_path / "f.json")
    assert result.exit_code == 0, result.output
    assert result.stderr == "" and "worst layers" not in result.stdout
    (candidate,) = json.loads((tmp_path / "f.json").read_text())["candidates"]
    assert candidate["layers"] == [] and 0 < candidate["velocity"]["overall"] < 0.1
    assert candidate["lpips"]["mean"] > 0 and f"{candidate['lpips']['mean']:.4f}" in result.stdout
    assert candidate["velocity"]["low"] is None and candidate["psnr"]["low"] is None


def test_text_to_image(tonfa, text_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    result = tonfa(
        "evaluate", text_pipeline, "--transformer", text_pipeline / "transformer",
        "--prompts", tmp_path / "prompts.txt",
        "--height", 32, "--width", 32, *SHORT, "--sheet", tmp_path / "s.png",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width == 3 * (32 + 8) + 8


@pytest.mark.usefixtures("never_load")
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--steps", 0), 2, "--steps"),
        (("--height", 100), 2, "100 is no positive multiple of 16"),
        (("--samples", 0), 2, "--samples"),
        (("--seed", -1), 2, "--seed"),
        (("--seed", 2**63), 2, "seeds are below 2**63"),
        (("--batch-size", 0), 2, "--batch-size"),
        (("--max-sequence-length", 513), 2, "--max-sequence-length"),
        (("--sheet", "s.txt"), 2, "the name must end with .png"),
        (("--lpips-backbone", "a.safetensors"), 2, "give both or none"),
        (("--lpips-backbone", "gone.a", "--lpips-heads", "gone.b"), 1, "gone.a: no such file"),
        (("--dtype", "float8"), 2, "'float8' is not one of"),
        (("--device", "tpu"), 2, "'tpu' is none of"),
        (("--json", "."), 1, "--json: . is a folder"),
        (("--sheet", "nowhere/s.png"), 1, "--sheet: there is no folder nowhere"),
        (("--prompts", "gone.json"), 1, "--prompts: no file gone.json"),
        (("--control-images", "gone"), 1, "--control-images: no folder gone"),
        (("--reference", "gone"), 1, "gone: holds no dense transformer"),
        (("--transformer", "gone"), 1, "there is no folder gone"),
    ],
)
def test_bad_input(
    tonfa,
    depth_pipeline: Path,
    checkpoint: Path,
    prompts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = tonfa("evaluate", depth_pipeline, "--transformer", checkpoint, "--prompts", prompts, *SHORT, *arguments)
    assert result.exit_code == code, result.output
    assert message in " ".join(result.stderr.split()), result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


@pytest.mark.usefixtures("never_load")
def test_models_and_prompts_that_do_not_belong_together(
    tonfa, depth_pipeline: Path, text_pipeline: Path, checkpoint: Path, prompts: Path, tmp_path: Path
) -> None:
    def run(model: Path, transformer: Path, *more: object, file: Path = prompts) -> str:
        result = tonfa("evaluate", model, "--transformer", transformer, "--prompts", file, *more)
        assert result.exit_code in (1, 2) and result.stdout == "", result.output
        return " ".join(result.stderr.split())

    plain = tmp_path / "plain.txt"
    plain.write_text("a cat\n")
    own = text_pipeline / "transformer"
    assert "is a control transformer, the reference a text-to-image one" in run(text_pipeline, checkpoint, file=plain)
    assert "there is none for 'a cat'" in run(depth_pipeline, checkpoint, file=plain)
    assert "the model reads no control images; leave that of 'a cat' out" in run(text_pipeline, own)
    assert "no --transformer is quantized" in run(text_pipeline, own, "--activations", "int8", file=plain)
    assert "has no model_index.json" in run(own, own, file=plain)
    for changed, message in (
        ({"joint_attention_dim": 48}, "other has joint_attention_dim 48, the reference 32"),
        ({"guidance_embeds": False}, "other has guidance_embeds False, the reference True"),
        ({"num_single_layers": 7}, "num_single_layers 7, the reference 1; add --no-layers to compare the rest"),
    ):
        other = shutil.copytree(depth_pipeline / "transformer", tmp_path / "other", dirs_exist_ok=True)
        config = json.loads((depth_pipeline / "transformer" / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | changed))
        assert message in run(depth_pipeline, other)
        if "num_single_layers" not in changed:
            refused = run(depth_pipeline, checkpoint, "--reference", other)
            assert "the pipeline's own transformer" in refused and "--reference: " in refused
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "config.json" in run(depth_pipeline, empty)
    assert "the prompts name control images of their own" in run(
        depth_pipeline, checkpoint, "--control-images", prompts.parent
    )


def test_names_are_short_where_they_differ() -> None:
    def short(*paths: str) -> list[str]:
        return short_names([SimpleNamespace(name=path) for path in paths])

    assert short("a/first", "a/second") == ["first", "second"]
    assert short("a/transformer", "b/transformer", "c/other") == ["a/transformer", "b/transformer", "c/other"]


def test_interrupted_writes_nothing(
    tonfa, depth_pipeline: Path, checkpoint: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tonfa.evaluate.compare.Evaluation.compare", stop)
    command = ("evaluate", depth_pipeline, "--transformer", checkpoint, "--prompts", prompts, *SHORT)
    result = tonfa(*command, "--json", tmp_path / "f.json", "--sheet", tmp_path / "s.png")
    assert result.exit_code == 130 and "nothing was written" in result.stderr
    assert not (tmp_path / "f.json").exists() and not (tmp_path / "s.png").exists()
