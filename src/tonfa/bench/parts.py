"""Where the time of a step goes: its GPU kernels by part, each part with the least time that its work can take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tonfa.bench.ceilings import Ceilings
from tonfa.bench.work import Work

RULES: tuple[tuple[str, str], ...] = (
    ("attention", r"flash|fmha|sdpa|attention|softmax"),
    ("expand", r"expand|widen|decode"),
    ("products", r"product|gemm|nvjet|cutlass|cublas|xmma|wgmma|matmul|splitk|scaled_mm|gemv"),
    ("quantize", r"quantize|norm_modulate"),
    ("modulation", r"w4a16|modulation"),
)
"""Part and pattern, the first that a kernel's name holds; a fused kernel counts where most of its time goes."""

REST = "rest"
IDLE = "idle"
"""Time in which no kernel runs."""
PARTS = ("quantize", "products", "expand", "attention", "modulation", REST, IDLE)


def classify(kernel: str) -> str:
    """The part that a kernel belongs to, by its name."""
    name = kernel.lower()
    return next((part for part, pattern in RULES if re.search(pattern, name)), REST)


def by_part(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(name, milliseconds) of every kernel -> milliseconds by part."""
    sums = dict.fromkeys(PARTS, 0.0)
    for name, elapsed in kernels:
        sums[classify(name)] += elapsed
    return sums


def profile_step(step: Callable[[], Any], device: torch.device) -> list[tuple[str, float]]:
    """Every GPU kernel and copy of one step: (name, milliseconds)."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize(device)
    events = profiler.events() or []
    return [(e.name, e.time_range.elapsed_us() * 1e-3) for e in events if e.device_type.name == "CUDA"]


def floors(work: Work, ceilings: Ceilings, weights: str, activations: str) -> dict[str, tuple[float, str]]:
    """Milliseconds that a part takes at the measured ceilings if everything around it is fused, and the reckoning."""
    rate, kind = ceilings.product(activations)

    def flops(amount: float, at: float, what: str) -> tuple[float, str]:
        return amount / at * 1e3, f"{amount / 1e12:.1f} TFLOP at {at / 1e12:.0f} TFLOP/s ({what})"

    def moved(amount: float) -> tuple[float, str]:
        return amount / ceilings.bandwidth * 1e3, f"{amount / 1e9:.2f} GB at {ceilings.bandwidth / 1e12:.2f} TB/s"

    main, branch = flops(work.linear_flops, rate, kind), flops(work.lowrank_flops, ceilings.bf16, "BF16")
    return {
        "quantize": moved(work.quantize_bytes),
        "products": (main[0] + branch[0], f"{main[1]} + {branch[1]}"),
        "expand": moved(work.packed_bytes) if weights == "int4" and activations != "int4" else (0.0, "nothing to do"),
        "attention": flops(work.attention_flops, ceilings.attention, "BF16"),
        "modulation": moved(work.modulation_bytes),
        REST: flops(work.outer_flops, ceilings.bf16, "BF16, embedders and output"),
        IDLE: (0.0, "none"),
    }


def described(
    kernels: Iterable[tuple[str, float]], step_ms: float, least: dict[str, tuple[float, str]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Parts and floor of a step, as a record holds them: value and floor in ms, why; their sum."""
    values = by_part(kernels)
    values[IDLE] = max(0.0, step_ms - sum(values.values()))
    parts = {
        name: {"value": round(values[name], 4), "floor": round(least[name][0], 4), "why": least[name][1]}
        for name in PARTS
    }
    why = "; ".join(f"{name}: {reason}" for name, (bound, reason) in least.items() if bound)
    return parts, {"value": round(sum(bound for bound, _ in least.values()), 4), "why": why}
