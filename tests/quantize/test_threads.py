"""Small matrices are solved for in one thread, and the process has its threads back afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tonfa.plan import LinearPlan
from tonfa.quantizer import planned
from tonfa.quantizer.recipe import Recipe
from tonfa.quantizer.threads import SMALL, suited_threads


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_by_size() -> None:
    for weights, expected in ((SMALL, 1), (SMALL + 1, 2)):
        with suited_threads(weights):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 2


def test_threads_are_given_back_after_an_error() -> None:
    with pytest.raises(KeyError), suited_threads(1):
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("kind", ["svdq", "w4a16"])
def test_planned_linears_are_made_so(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for name in ("quantize_linear", "quantize_modulation"):
        monkeypatch.setattr(planned, name, lambda *_, **__: seen.append(torch.get_num_threads()))
    linear = LinearPlan("block.0", ("block.0",), kind, 64, 64)
    planned.quantize_planned(linear, torch.ones(64, 64), torch.ones(64), Recipe(), torch.bfloat16)
    assert seen == [1]
