"""Poisoned memory and thread counts for the kernels of the CPU backend."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tonfa.kernels.cpu import product
from tonfa.kernels.cpu.workspace import Workspace


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` gives NaN and the largest integers, so a value that a kernel leaves out is seen."""
    monkeypatch.setattr(product, "WORKSPACE", Workspace())
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run with this many torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
