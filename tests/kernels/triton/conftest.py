"""The same tests run on a GPU and, without one, in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Deterministic algorithms, which poison memory, demand it of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from tonfa.kernels.triton import product, tiles
from tonfa.kernels.triton.scratch import Scratch


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Iterator[None]:
    """`torch.empty` gives NaN and the largest integers, so a value that a kernel leaves out is seen."""
    monkeypatch.setattr(product, "SCRATCH", Scratch())
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1, device=device).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["interpreted-sm90", "interpreted-sm80", pytest.param("gpu", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the kernels are configured for: in the interpreter with descriptors and, for INT8, with pointers."""
    name: str = request.param
    if name == "gpu":
        return name
    if torch.cuda.is_available():
        pytest.skip("a GPU runs the kernels itself")
    if name.endswith("80") and request.getfixturevalue("activations") == "fp8":
        pytest.skip("FP8 needs compute capability 8.9")
    monkeypatch.setattr(tiles, "processors", lambda device: ((9, 0) if name.endswith("90") else (8, 0), 2))
    return name


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
