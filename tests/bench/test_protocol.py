from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import tonfa
from tonfa.bench import protocol
from tonfa.bench.protocol import Timing, append, commit, interleaved, record, results_file, settle

CPU = torch.device("cpu")


def test_timing_is_the_median_with_extremes() -> None:
    assert Timing.of([5.0, 1.0, 9.0, 3.0]) == Timing(4.0, 1.0, 9.0, 4)
    assert Timing(4.0, 1.0, 9.0, 4).scaled(0.5) == Timing(2.0, 0.5, 4.5, 4)


@pytest.mark.parametrize(
    ("times", "least", "runs"),
    [
        ([90, 50, 10, 10.1, 10.2, 99], 3, 5),  # stable at the fifth
        ([10, 10, 10, 10, 10, 10], 5, 5),
        ([1, 2] * 20, 3, protocol.WARMUP_MOST),  # never stable
        ([1], 0, 0),
    ],
)
def test_warming_up_ends_when_times_agree(times: list[float], least: int, runs: int) -> None:
    left = list(times)
    settle(lambda: left.pop(0), least)
    assert len(times) - len(left) == runs


def test_candidates_take_turns_and_inputs_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(protocol, "milliseconds", lambda function, *_: (function(), float(len(calls)))[1])
    candidates = {"a": [lambda: calls.append("a0"), lambda: calls.append("a1")], "b": [lambda: calls.append("b")]}
    timings = interleaved(candidates, 20, CPU, warmup=0)
    rounds = [calls[i : i + 2] for i in range(0, 40, 2)]
    assert [next(call for call in pair if call != "b") for pair in rounds] == ["a0", "a1"] * 10
    assert all("b" in pair for pair in rounds) and 4 < sum(pair[0] == "b" for pair in rounds) < 16
    ends = [float(calls.index("b") + 1), float(len(calls) - calls[::-1].index("b"))]
    assert [timings["b"].least, timings["b"].most] == ends and timings["a"].runs == timings["b"].runs == 20


def test_a_time_limit_ends_runs_but_not_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += 2.0

    monkeypatch.setattr(protocol, "milliseconds", lambda function, *_: (function(), 5.0)[1])
    both = {"a": [work], "b": [work]}
    assert {t.runs for t in interleaved(both, 20, CPU, warmup=0, seconds=25.0).values()} == {7}
    assert {t.runs for t in interleaved(both, 20, CPU, warmup=0, seconds=5.0).values()} == {protocol.LEAST_RUNS}
    assert {t.runs for t in interleaved(both, 20, CPU, warmup=0).values()} == {20}


def test_a_time_limit_ends_warming_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = [0.0], iter([1.0, 2.0] * 20)
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: clock[0])

    def run() -> float:
        clock[0] += 2.0
        return next(times)

    settle(run, 3, seconds=9.0)
    assert clock[0] == 10.0
    settle(run, 3, seconds=1.0)
    assert clock[0] == 16.0  # three runs in any case


def test_ratios_of_times_and_of_errors() -> None:
    baselines = {"x": Timing(30.0, 1, 1, 1), "zero": Timing(0.0, 0, 0, 1)}
    faster = record("step", {}, "v", {}, Timing(10.0, 9.0, 12.0, 20), CPU, baselines)
    assert faster["ratios"] == {"x": 3.0} and faster["baselines"] == {"x": 30.0, "zero": 0.0}
    assert (faster["value"], faster["min"], faster["max"], faster["runs"]) == (10.0, 9.0, 12.0, 20)
    better = record("error", {}, "v", {}, Timing(10.0, 10.0, 10.0, 1), CPU, baselines, unit="relative")
    assert better["ratios"] == {"x": 0.333} and better["unit"] == "relative"


def test_records_are_appended(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.jsonl"
    append(file, {"a": 1})
    append(file, {"a": 2})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"a": 1}, {"a": 2}]


def test_commit_of_this_checkout_or_nothing() -> None:
    found = commit().removesuffix("+changes")
    assert found == "" or (len(found) == 40 and int(found, 16))


def test_a_package_that_no_checkout_tracks_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one installed into an environment that lies inside of another project's checkout."""
    package = tmp_path / "site-packages" / "tonfa"
    (package / "bench").mkdir(parents=True)
    shutil.copy(Path(tonfa.__file__).parent / "version.py", package)
    protocol._output("git", "init", str(tmp_path))
    monkeypatch.setattr(protocol, "__file__", str(package / "bench" / "protocol.py"))
    assert commit() == ""


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert commit() == ""


def test_results_go_to_the_checkout_or_to_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(protocol, "_cpu_facts", lambda: {"model name": "Some CPU (R) @ 3 GHz"})
    assert results_file(CPU) == Path("tonfa-bench-cpu-some-cpu-r-3-ghz.jsonl")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert results_file(CPU) == Path("benchmarks/results/cpu-some-cpu-r-3-ghz.jsonl")
    monkeypatch.setattr(protocol, "_cpu_facts", lambda: {"cpu family": "25", "flags": "sse avx512_vnni"})
    assert results_file(CPU).name == "cpu-zen4.jsonl"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert results_file(torch.device("cuda")).name == "nvidia-h200.jsonl"
