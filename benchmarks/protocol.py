"""How every number is measured and written down: interleaved runs, medians, one JSON line a variant and case."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SCHEMA = 1


@dataclass(frozen=True)
class Timing:
    """Milliseconds of several runs."""

    median: float
    least: float
    most: float
    runs: int


def milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    """One run: wall time on the CPU, CUDA events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def interleaved(
    candidates: Mapping[str, list[Callable[[], Any]]], runs: int, device: torch.device, warmup: int = 3
) -> dict[str, Timing]:
    """Time the candidates in turn, so that what else the machine does meets all of them alike.

    Each has a list of functions, taken one after another, so that no run finds its input in a cache.
    """
    turns = {name: cycle(functions) for name, functions in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for run in range(warmup + runs):
        for name, functions in turns.items():
            elapsed = milliseconds(next(functions), device)
            if run >= warmup:
                times[name].append(elapsed)
    return {name: Timing(statistics.median(t), min(t), max(t), runs) for name, t in times.items()}


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    facts = _cpu_facts()
    family = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.processor())} ({family}, {torch.get_num_threads()} threads)"


def results_file(device: torch.device) -> Path:
    """results/<device>.jsonl, such as cpu-zen4 or nvidia-h200."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        facts = _cpu_facts()
        zen4 = facts.get("cpu family") == "25" and "avx512_vnni" in facts.get("flags", "").split()
        name = "cpu zen4" if zen4 else f"cpu {facts.get('model name', platform.processor())}"
    return HERE / "results" / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".jsonl")


def record(
    bench: str,
    case: Mapping[str, Any],
    variant: str,
    settings: Mapping[str, Any],
    timing: Timing,
    device: torch.device,
    baselines: Mapping[str, Timing] | None = None,
    memory_gib: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """One line of the results, as README.md describes it; ratios over 1 mean faster than the baseline."""
    baselines = baselines or {}
    return {
        "schema": SCHEMA,
        "bench": bench,
        "case": dict(case),
        "variant": variant,
        "settings": dict(settings),
        "unit": "ms",
        "value": round(timing.median, 4),
        "min": round(timing.least, 4),
        "max": round(timing.most, 4),
        "runs": timing.runs,
        "baselines": {name: round(t.median, 4) for name, t in baselines.items()},
        "ratios": {name: round(t.median / timing.median, 3) for name, t in baselines.items()},
        "memory_gib": {name: round(gib, 4) for name, gib in (memory_gib or {}).items()},
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


def environment(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date."""
    packages = ("torch", "diffusers", "numba", "triton", "tonfa")
    versions = {name: found for name in packages if (found := _version(name)) is not None}
    if device.type == "cuda":
        versions["cuda"] = str(torch.version.cuda)
    return {
        "device": device_name(device),
        "versions": versions,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit that is measured; "+changes" if the package or the benchmarks differ from it."""
    head = _git("rev-parse", "HEAD")
    return head + ("+changes" if _git("status", "--porcelain", "--", "src", "benchmarks/*.py") else "")


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add one record to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=HERE.parent, capture_output=True, text=True, check=True
    ).stdout.strip()


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
