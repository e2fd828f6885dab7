"""Where the time of a step goes: its GPU kernels by part, each part with the least time that its work can take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from tonfa.bench.ceilings import Ceilings
from tonfa.bench.work import Work

RULES: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|sdpa|attention|softmax"),
    ("expand", r"expand|widen|decode"),
    ("products", r"product|gemm|nvjet|cutlass|cublas|xmma|wgmma|matmul|splitk|scaled_mm|gemv"),
    ("quantize", r"quantize|norm_modulate|add_lowrank|add_partials|^_measure|^_round"),
    ("modulation", r"w4a16|modulation"),
)
"""Part and pattern, the first that a kernel's name holds; a fused kernel counts where most of its time goes."""

REST = "rest"
IDLE = "idle"
"""Time in which no kernel runs."""
PROFILED = 10
"""Steps in a row."""
PARTS = ("quantize", "products", "expand", "attention", "modulation", REST, IDLE)


def classify(kernel: str) -> str:
    """The part that a kernel belongs to, by its name."""
    name = kernel.lower()
    return next((part for part, pattern in RULES if re.search(pattern, name)), REST)


@dataclass(frozen=True)
class Kernel:
    """A kernel or copy on the GPU: milliseconds on any clock that all of a step share."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Shares:
    """Milliseconds of a part."""

    exposed: float
    """In which it kept the GPU busy and nothing that started earlier did: these sum to the busy time of the step."""
    busy: float
    """Of its kernels, those that run beside others included."""


def by_part(kernels: Iterable[Kernel]) -> dict[str, Shares]:
    """Every part's share of the time in which any kernel runs.

    Where kernels overlap, the time is that of the one that started first: a kernel that is launched early waits for
    the one in front of it, and what runs beside a longer one costs nothing but what is left when that is done.
    """
    exposed, busy = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0)
    covered = float("-inf")
    for kernel in sorted(kernels, key=lambda k: (k.start, k.end)):
        part = classify(kernel.name)
        exposed[part] += max(0.0, kernel.end - max(kernel.start, covered))
        busy[part] += kernel.end - kernel.start
        covered = max(covered, kernel.end)
    return {name: Shares(exposed[name], busy[name]) for name in PARTS}


def profile_step(step: Callable[[], Any], device: torch.device) -> list[Kernel]:
    """Every GPU kernel and copy of a step: the last of several, as the clocks fall where steps follow each other."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:  # else torch warns of what is lost
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize(device)
    kernels = [
        Kernel(e.name, e.time_range.start * 1e-3, e.time_range.end * 1e-3)
        for e in profiler.events() or []
        if e.device_type.name == "CUDA" and not getattr(e, "is_user_annotation", False)
    ]
    return last(kernels, PROFILED)


def last(kernels: Iterable[Kernel], runs: int) -> list[Kernel]:
    """Those of the last of so many runs, which all start the same kernels, one run after another."""
    ordered = sorted(kernels, key=lambda k: (k.start, k.end))
    return ordered[len(ordered) - len(ordered) // runs :]


def floors(
    work: Work, ceilings: Ceilings, weights: str, activations: str, attention: str = "sdpa"
) -> dict[str, tuple[float, str]]:
    """Milliseconds that a part takes at the measured ceilings if everything around it is fused, and the reckoning."""
    rate, kind = ceilings.product(activations)
    attending, how = ceilings.attending(attention)

    def flops(amount: float, at: float, what: str) -> tuple[float, str]:
        return amount / at * 1e3, f"{amount / 1e12:.1f} TFLOP at {at / 1e12:.0f} TFLOP/s ({what})"

    def moved(amount: float) -> tuple[float, str]:
        return amount / ceilings.bandwidth * 1e3, f"{amount / 1e9:.2f} GB at {ceilings.bandwidth / 1e12:.2f} TB/s"

    main, branch = flops(work.linear_flops, rate, kind), flops(work.lowrank_flops, ceilings.bf16, "BF16")
    return {
        "quantize": moved(work.quantize_bytes),
        "products": (main[0] + branch[0], f"{main[1]} + {branch[1]}"),
        "expand": moved(work.packed_bytes) if weights == "int4" and activations != "int4" else (0.0, "nothing to do"),
        "attention": flops(work.attention_flops, attending, how),
        "modulation": moved(work.modulation_bytes),
        REST: flops(work.outer_flops, ceilings.bf16, "BF16, embedders and output"),
        IDLE: (0.0, "none"),
    }


def described(
    kernels: Iterable[Kernel], step_ms: float, least: dict[str, tuple[float, str]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Parts and floor of a step, as a record holds them: value, busy and floor in ms, why; their sum.

    Values sum to `step_ms`. Under the profiler kernels may take longer than in the timed step: then shares count.
    """
    shares = by_part(kernels)
    running = sum(share.exposed for share in shares.values())
    scale = min(1.0, step_ms / running) if running else 1.0
    values = {name: scale * share.exposed for name, share in shares.items()}
    values[IDLE] = max(0.0, step_ms - running)
    parts = {
        name: {
            "value": round(values[name], 4),
            "busy": round(shares[name].busy, 4),
            "floor": round(least[name][0], 4),
            "why": least[name][1],
        }
        for name in PARTS
    }
    why = "; ".join(f"{name}: {reason}" for name, (bound, reason) in least.items() if bound)
    return parts, {"value": round(sum(bound for bound, _ in least.values()), 4), "why": why}
