"""How memory is reckoned, with counters in place of a GPU's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from bench_cases import CPU, TINY

from tonfa import SVDQFluxTransformer2DModel
from tonfa.bench.memory import allocated, described, step_memory
from tonfa.bench.synthetic import quantized_model, step_inputs

GIB = 2**30


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A GPU with 10 GiB allocated, 12 at most in a step, 20 reserved, and 1.5 more once a graph is recorded."""
    seen: list[object] = []
    reserved = iter([20 * GIB, 21.5 * GIB])
    fake = {
        "synchronize": lambda _: None,
        "empty_cache": lambda: seen.append("empty"),
        "memory_allocated": lambda _: 10 * GIB,
        "max_memory_allocated": lambda _: 12 * GIB,
        "memory_reserved": lambda _: next(reserved),
        "reset_peak_memory_stats": lambda _: seen.append("reset"),
    }
    for name, function in fake.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(SVDQFluxTransformer2DModel, "set_cuda_graphs", lambda _, enabled: seen.append(enabled))
    monkeypatch.setattr(SVDQFluxTransformer2DModel, "forward", lambda *_, **__: seen.append("step"))
    return seen


def test_peaks_of_a_step(calls: list[object]) -> None:
    model, inputs = quantized_model(TINY, 0, CPU), step_inputs(TINY, 32, 32, text_tokens=4)
    memory = step_memory(model, inputs, 6.5, True, torch.device("cuda"))
    assert memory == {"weights": 6.5, "peak": 8.5, "peak_graph": 8.0}
    eager = [False, "step", "reset", "step"]
    assert calls == [*eager, "empty", True, "step", "step", "empty", True]
    assert described(memory) == "weights 6.50, peak 8.50, peak_graph 8.00 GiB"


def test_baselines_and_models_without_graphs_have_no_pool(calls: list[object]) -> None:
    model = quantized_model(TINY, 0, CPU)
    assert step_memory(model, {}, 1.0, False, torch.device("cuda")) == {"weights": 1.0, "peak": 3.0}
    assert step_memory(lambda **_: None, {}, 2.0, True, torch.device("cuda")) == {"weights": 2.0, "peak": 4.0}
    assert calls == [False, "step", "reset", "step", "reset"]


def test_a_cpu_counts_weights_alone() -> None:
    assert allocated(CPU) == 0
    assert step_memory(SimpleNamespace(), {}, 1.5, True, CPU) == {"weights": 1.5}
