"""Rates of this machine, and a step's record with parts: on the CPU, with a profile in place of a GPU's."""

from __future__ import annotations

import pytest
import torch
from bench_cases import CPU, H200, TINY, request
from rich.console import Console

from tonfa.bench import ceilings, parts
from tonfa.bench.ceilings import Ceilings
from tonfa.bench.parts import PARTS, Kernel
from tonfa.bench.step import StepBench
from tonfa.bench.work import flux_work
from tonfa.cli.bench_tables import print_records

PROFILE = [Kernel("nvjet", 0.0, 1e-4), Kernel("flash_fwd", 1e-4, 3e-4), Kernel("add", 2e-4, 6e-4)]


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is work over time: a clock that always says a millisecond gives the work of the largest shape."""
    monkeypatch.setattr(ceilings, "COPY_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "RUNS", 2)
    monkeypatch.setattr("tonfa.bench.protocol.milliseconds", lambda function, *_: (function(), 1.0)[1])
    work = flux_work(TINY, 64, 64, 1, 16, 32)
    rates = ceilings.measure(work, 2, 64, 1, CPU)
    largest = max(2 * work.rows * n * k for n, k in work.shapes) * 1e3
    assert rates == Ceilings(
        bandwidth=2 * 2**20 * 1e3, bf16=largest, fp8=None, int8=largest, attention=4 * 2 * work.rows**2 * 64 * 1e3
    )
    rates = ceilings.measure(work, 2, 64, 1, CPU, activations=("fp8", "none"))
    assert (rates.bf16, rates.fp8, rates.int8) == (largest, None, None)
    assert ceilings.measure(work, 2, 64, 1, CPU, activations=("int4",)).int8 == largest


@pytest.mark.parametrize(
    ("activations", "rate"), [("fp8", 1371e12), ("int8", 763e12), ("int4", 763e12), ("none", 782e12)]
)
def test_rate_of_a_policy(activations: str, rate: float) -> None:
    assert H200.product(activations)[0] == rate
    bare = Ceilings(1.0, 2.0, None, None, 3.0)
    assert bare.product(activations) == (2.0, "BF16")


def test_parts_of_a_step_are_recorded_and_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepBench, "_ceilings", lambda *_: H200)
    monkeypatch.setattr(parts, "profile_step", lambda *_: PROFILE)
    records = list(StepBench(request(baselines=["rank-0"]), lambda _: None).run())
    ours, without = records
    assert list(ours["parts"]) == list(PARTS) and without["parts"] == {}
    assert ours["parts"]["attention"]["value"] == 2e-4
    assert sum(part["value"] for part in ours["parts"].values()) == pytest.approx(ours["value"], rel=1e-3)
    assert ours["floor"]["value"] >= 0 and "TFLOP/s" in ours["floor"]["why"]
    console = Console(width=200)
    with console.capture() as captured:
        print_records(records, console)
    text = captured.get()
    for name in PARTS:
        (row,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert f"{ours['parts'][name]['value']:.3f}" in row and f"{ours['parts'][name]['busy']:.3f}" in row
    assert text.count("floor") == 2  # one step has parts: its title and its column


def test_torch_gives_profiles_the_fields_that_are_read() -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.ones(64, 64) @ torch.ones(64, 64)
    events = [(e.name, e.device_type.name, e.time_range.end - e.time_range.start) for e in profiler.events()]
    assert any(name == "aten::mm" and device == "CPU" and elapsed > 0 for name, device, elapsed in events)
