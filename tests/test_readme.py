"""What the README says runs: its scripts are executed with local models, its commands' options exist."""

from __future__ import annotations

import itertools
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import tonfa
from tiny_models import save_tiny_depth_model, save_tiny_pipeline
from tonfa.cli.app import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DEMO = ROOT / "demo"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def script(marker: str) -> str:
    (found,) = (block for block in blocks("python") if marker in block)
    return found


def replaced(text: str, replacements: dict[str, str]) -> str:
    """Every key must be there: a script that is changed cannot slip past this test."""
    for old, new in replacements.items():
        assert old in text, f"the README's script no longer has {old!r}"
        text = text.replace(old, new)
    return text


@pytest.fixture(params=["tiny", "demo"])
def pipeline(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "tiny":
        return save_tiny_pipeline(tmp_path / "pipeline")
    if not (DEMO / "model").exists():
        pytest.skip("demo/model is not in this checkout")
    return DEMO / "model"


def test_script_of_the_model_card(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(photo)
    quantized = CliRunner().invoke(app, ["quantize", str(pipeline), "--out", "int4", "--iterations", "0"])
    assert quantized.exit_code == 0, quantized.output
    (url,) = re.findall(r'load_image\("(.*?)"\)', README)
    code = replaced(
        script("FluxControlPipeline"),
        {
            'from_pretrained("flux.1-depth-dev-int4")': f'from_pretrained("{tmp_path / "int4"}")',
            "black-forest-labs/FLUX.1-Depth-dev": str(pipeline),
            "LiheYoung/depth-anything-large-hf": str(save_tiny_depth_model(tmp_path / "depth")),
            url: str(photo),
            '"cuda"': '"cpu"',
            "height=1024, width=1024, num_inference_steps=30": "height=64, width=80, num_inference_steps=2",
        },
    )
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Diffusers deprecates the model card's torch_dtype
        exec(compile(code, "README.md", "exec"), names)
    with Image.open("flux.1-depth-dev-int4.png") as image:
        picture = np.asarray(image)
    assert picture.shape == (64, 80, 3) and picture.std() > 1
    assert isinstance(names["control_image"], Image.Image) and names["control_image"].size == (48, 40)
    assert names["pipe"].transformer is names["transformer"]


def test_script_of_one_linear() -> None:
    torch.manual_seed(0)
    names: dict[str, float] = {}
    code = replaced(script("SVDQLinear"), {"256, 3072": "8, 3072", "3072": "256"})
    exec(compile(code, "README.md", "exec"), names)
    assert 0 < names["error"] < 0.12


def test_script_of_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(script("tonfa.quantize("), "README.md", "exec"), names)
    dense = torch.nn.Sequential(torch.nn.Linear(128, 256), torch.nn.GELU(), torch.nn.Linear(256, 128))
    loaded = tonfa.load_model(dense, "small-int4")
    x = torch.randn(5, 128)
    assert torch.equal(loaded(x), names["model"](x)) and names["model"](x).std() > 0


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("tonfa ")]


@pytest.mark.parametrize("command", commands(), ids=lambda c: f"{c[1]}-{c[2]}")
def test_commands_exist_with_these_options(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = CliRunner().invoke(app, [command[1], "--help"]).stdout
    options = [word for word in command if word.startswith("--")]
    assert options and all(re.search(rf"{option}\b", text) for option in options)


def test_prompts_that_commands_read_are_there_or_made_before() -> None:
    made: list[Path] = []
    read = 0
    for block in blocks("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            options = dict(itertools.pairwise(words))
            if prompts := options.get("--prompts"):
                read += 1
                assert (ROOT / prompts).exists() or Path(prompts).parent in made, prompts
            if "--out" in options:
                made.append(Path(options["--out"]))
    assert read


def test_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "docs/checkpoint.md",
        "docs/evaluation.md",
        "docs/commands.md",
        "docs/hopper.md",
        "docs/method.md",
        "docs/any-model.md",
    ],
)
def test_files_that_are_named_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!http|#)(.*?)\)", text)]
    paths = re.findall(r"`((?:src|tests|demo|docs)/[\w./-]+\.\w+)`", text)
    if document == "README.md":
        assert len(paths) > 8
    missing = [
        p for p in links + paths if not (ROOT / document).parent.joinpath(p).exists() and not (ROOT / p).exists()
    ]
    assert not missing


def test_table_of_defaults_agrees_with_dispatch() -> None:
    from tonfa.dispatch import default_activations
    from tonfa.ops.activation import ACTIVATIONS

    rows = dict(re.findall(r"^\| `(\w+)` \| .* \| (.*) \|$", README, re.MULTILINE))
    assert sorted(rows) == sorted(ACTIVATIONS)
    assert "CPU" in rows[default_activations(torch.device("cpu"))]
