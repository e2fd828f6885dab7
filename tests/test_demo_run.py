"""demo/run.py, the script of `make demo`, with a tiny model."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tiny_models import save_tiny_pipeline

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_run", ROOT / "demo" / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo_run"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_sheet_table_and_checkpoint(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    rows = []
    for i in range(2):
        Image.fromarray(np.full((32, 48), 60 * i, dtype=np.uint8)).save(inputs / f"{i}.png")
        rows.append({"control_image": f"{i}.png", "prompt": f"a cat and {i} dogs " * 5, "seed": i})
    (inputs / "prompts.json").write_text(json.dumps(rows))
    model = save_tiny_pipeline(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--model", model, "--inputs", inputs, "--out", out, "--steps", 2, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
    run.main()
    text = capsys.readouterr().out
    assert "quantized" in text and text.count("PSNR") == 2 and "x smaller" in text
    assert (out / "transformer-int4" / "config.json").is_file()
    with Image.open(out / "contact-sheet.png") as sheet:
        assert sheet.width == 4 * 48 + 5 * 8
        assert np.asarray(sheet).std() > 1
    names = {f"{i}-{name}.png" for i in range(2) for name in ("16-bit", "4-bit")}
    assert names <= {p.name for p in out.iterdir()}
    first = (out / "0-4-bit.png").read_bytes()

    run.main()
    assert "exists; remove it to quantize again" in capsys.readouterr().out
    assert (out / "0-4-bit.png").read_bytes() == first


def test_inputs_that_are_shipped(run: ModuleType) -> None:
    problems = run.read_problems(ROOT / "demo" / "inputs")
    assert len(problems) == 4
    assert len({p.prompt for p in problems}) == 4 and all(p.depth.mode == "RGB" for p in problems)


def test_measures(run: ModuleType) -> None:
    black, gray = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), (10, 10, 10))
    assert run.psnr(black, black) == math.inf
    assert run.psnr(black, gray) == pytest.approx(20 * math.log10(25.5))
    assert np.asarray(run.difference(black, gray)).max() == 40
    assert np.asarray(run.difference(Image.new("RGB", (8, 8), "white"), black)).max() == 255
