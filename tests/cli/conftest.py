"""Pipelines and a quantized transformer that all tests of the command line share, and the command line itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tiny_models import save_tiny_depth_model, save_tiny_pipeline
from tonfa.cli.app import app

Tonfa = Callable[..., Any]


@pytest.fixture
def tonfa(monkeypatch: pytest.MonkeyPatch) -> Tonfa:
    """Run `tonfa` with these arguments in this process, in a terminal wide enough that messages are not wrapped."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return run


@pytest.fixture(scope="session")
def depth_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "depth")


@pytest.fixture(scope="session")
def text_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("pipelines") / "text", control=False)


@pytest.fixture(scope="session")
def checkpoint(depth_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The depth pipeline's transformer in 4 bits."""
    out = tmp_path_factory.mktemp("checkpoints") / "int4"
    result = CliRunner().invoke(app, ["quantize", str(depth_pipeline), "--out", str(out), "--iterations", "1"])
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def depth_map(tmp_path: Path) -> Path:
    """64 x 48 pixels: sizes that the model can draw."""
    path = tmp_path / "depth.png"
    levels = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
    Image.fromarray(levels).save(path)
    return path


@pytest.fixture(scope="session")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_depth_model(tmp_path_factory.mktemp("depth-model"))
