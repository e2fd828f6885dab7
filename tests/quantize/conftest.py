"""The dense model is saved once; tests copy what they change."""

from __future__ import annotations

from pathlib import Path

import pytest
from dense_flux import save_dense


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux") / "dense"
    save_dense(folder)
    return folder
