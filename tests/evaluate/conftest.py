"""A tiny depth pipeline and depth maps for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiny_models import save_tiny_pipeline


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("evaluate") / "pipeline")


@pytest.fixture
def pipe(tiny_pipeline: Path) -> Any:
    from diffusers import FluxControlPipeline

    pipe = FluxControlPipeline.from_pretrained(tiny_pipeline, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def depth_maps(tmp_path: Path) -> list[Path]:
    """Two ramps of 32 x 48 pixels."""
    paths = []
    for i in range(2):
        levels = np.linspace(255 * i, 255 * (1 - i), 32 * 48).reshape(32, 48).astype(np.uint8)
        paths.append(tmp_path / f"depth-{i}.png")
        Image.fromarray(levels).save(paths[-1])
    return paths
