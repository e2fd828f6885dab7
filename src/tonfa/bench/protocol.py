"""How every number is measured and written down: interleaved runs, medians, one JSON line a variant and case."""

from __future__ import annotations

import json
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from tonfa.version import __version__

SCHEMA = 1
WARMUP = 3
"""Runs before the first that is timed, at least."""
WARMUP_MOST = 20
"""Warming up ends here, stable or not: a machine that others use never is."""
LEAST_RUNS = 5
"""Of each candidate where a time limit leaves room for no more."""
STABLE = 0.05
"""The last three runs of a warm candidate lie within this share of their median."""
QUEUE_CYCLES = 2_000_000
"""About a millisecond of GPU clock, in which the host queues a single op, so that its launch time is not measured."""

_PACKAGES = ("torch", "diffusers", "numba", "triton", "torchao", "comfy-kitchen")

Say = Callable[[str], None]
"""Tells people what is being done."""


@dataclass(frozen=True)
class Timing:
    """Median, least and most of several runs, in the unit of their record: milliseconds unless it says otherwise."""

    median: float
    least: float
    most: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Timing:
        """Of these values."""
        return cls(statistics.median(values), min(values), max(values), len(values))

    def scaled(self, factor: float) -> Timing:
        """In another unit."""
        return Timing(self.median * factor, self.least * factor, self.most * factor, self.runs)


def milliseconds(function: Callable[[], Any], device: torch.device, queued: bool = False) -> float:
    """One run: wall time on the CPU, CUDA events on a GPU.

    `queued` keeps the GPU busy until the host has launched everything: for single ops, whose launch is no part of them.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if queued:
        torch.cuda._sleep(QUEUE_CYCLES)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def settle(run: Callable[[], float], least: int, seconds: float | None = None) -> None:
    """Run until the last three times agree: first runs compile, bind weights, record graphs and fill caches.

    `seconds` ends it earlier, after `least` runs at least.
    """
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < max(least, WARMUP_MOST if least else 0):
        times.append(run())
        last = times[-3:]
        if seconds is not None and len(times) >= least and time.perf_counter() - started > seconds:
            return
        if len(times) >= max(least, 3) and max(last) - min(last) <= STABLE * statistics.median(last):
            return


def interleaved(
    candidates: Mapping[str, Sequence[Callable[[], Any]]],
    runs: int,
    device: torch.device,
    warmup: int = WARMUP,
    queued: bool = False,
    seconds: float | None = None,
) -> dict[str, Timing]:
    """Time the candidates in turn, so that what else the machine does meets all of them alike.

    Each round has another order: a GPU at its power limit is slower behind one candidate than behind another.

    Each has a list of functions, taken one after another, so that no run finds its input in a cache. Each is warmed up
    first, `warmup` runs at least; 0 measures the first run. `seconds` is a limit for the timed runs of all together;
    each has LEAST_RUNS even if they take longer.
    """
    turns = {name: cycle(functions) for name, functions in candidates.items()}
    for functions in turns.values():
        settle(lambda functions=functions: milliseconds(next(functions), device, queued), warmup, seconds)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.perf_counter()
    for run in range(runs):
        if seconds is not None and run >= LEAST_RUNS and time.perf_counter() - started > seconds:
            break
        for name in random.Random(run).sample(list(turns), len(turns)):
            times[name].append(milliseconds(next(turns[name]), device, queued))
    return {name: Timing.of(values) for name, values in times.items()}


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = _cpu_facts()
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.processor())} ({family}, {torch.get_num_threads()} threads)"


def results_file(device: torch.device) -> Path:
    """Where records go: benchmarks/results/<device>.jsonl in a checkout of tonfa, else ./tonfa-bench-<device>.jsonl.

    <device> is such as cpu-zen4 or nvidia-h200.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        facts = _cpu_facts()
        zen4 = facts.get("cpu family") == "25" and "avx512_vnni" in facts.get("flags", "").split()
        name = "cpu zen4" if zen4 else f"cpu {facts.get('model name', platform.processor())}"
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    results = Path("benchmarks/results")
    return results / f"{slug}.jsonl" if results.is_dir() else Path(f"tonfa-bench-{slug}.jsonl")


def record(
    bench: str,
    case: Mapping[str, Any],
    variant: str,
    settings: Mapping[str, Any],
    timing: Timing,
    device: torch.device,
    baselines: Mapping[str, Timing] | None = None,
    memory_gib: Mapping[str, float] | None = None,
    floor: Mapping[str, Any] | None = None,
    parts: Mapping[str, Mapping[str, Any]] | None = None,
    prediction: Mapping[str, Any] | None = None,
    unit: str = "ms",
) -> dict[str, Any]:
    """One line of the results, as benchmarks/README.md describes it.

    Ratios of times are baseline / value, over 1 is faster; of errors (unit "relative") value / baseline, under 1 is
    better.
    """
    baselines = baselines or {}

    def ratio(baseline: float) -> float:
        return timing.median / baseline if unit == "relative" else baseline / timing.median

    return {
        "schema": SCHEMA,
        "bench": bench,
        "case": dict(case),
        "variant": variant,
        "settings": dict(settings),
        "unit": unit,
        "value": _rounded(timing.median),
        "min": _rounded(timing.least),
        "max": _rounded(timing.most),
        "runs": timing.runs,
        "baselines": {name: _rounded(t.median) for name, t in baselines.items()},
        "ratios": {name: round(ratio(t.median), 3) for name, t in baselines.items() if t.median},
        "memory_gib": {name: _rounded(gib) for name, gib in (memory_gib or {}).items()},
        "floor": dict(floor or {}),
        "parts": {name: dict(part) for name, part in (parts or {}).items()},
        **({"prediction": dict(prediction)} if prediction else {}),
        **environment(device),
    }


def error_record(
    case: Mapping[str, Any],
    variant: str,
    settings: Mapping[str, Any],
    value: float,
    baselines: Mapping[str, float],
    device: torch.device,
) -> dict[str, Any]:
    """One line of the results for a relative error; ratios under 1 mean a smaller error than the baseline."""
    return {
        "schema": SCHEMA,
        "bench": "error",
        "case": dict(case),
        "variant": variant,
        "settings": dict(settings),
        "unit": "relative error",
        "value": round(value, 6),
        "baselines": {name: round(v, 6) for name, v in baselines.items()},
        "ratios": {name: round(value / v, 4) for name, v in baselines.items()},
        **environment(device),
    }


def _rounded(value: float) -> float:
    """Six digits, whatever the unit."""
    return float(f"{value:.6g}")


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date."""
    versions = {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    versions["tonfa"] = __version__
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
        versions["cudnn"] = str(torch.backends.cudnn.version())
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if driver:
            versions["driver"] = driver.splitlines()[0]
    return {
        "device": device_name(device),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit that is measured; "+changes" if the package differs from it; "" if it is not of a git checkout."""
    package = Path(__file__).resolve().parents[1]
    if _git(package, "ls-files", "--", "version.py") != "version.py":
        return ""  # a checkout around the environment that the package is installed in says nothing of it
    changed = _git(package, "status", "--porcelain", "--", ".")
    return _git(package, "rev-parse", "HEAD") + ("+changes" if changed else "")


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add one record to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _git(folder: Path, *arguments: str) -> str:
    return _output("git", "-C", str(folder), *arguments)


def _output(*command: str) -> str:
    """What a program prints; "" where it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return result.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_facts() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    pairs = (line.partition(":") for line in path.read_text(encoding="utf-8").split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
