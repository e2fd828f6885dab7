"""How far one step is from the same 4-bit weights with exact activations, for each way to quantize activations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tonfa.bench.models import four_bit_model
from tonfa.bench.protocol import Say, Timing, record
from tonfa.bench.synthetic import step_inputs
from tonfa.bench.variant import SIXTEEN_BITS, Variant, finite
from tonfa.layers.linear import SVDQLinear

PUBLISHED = "int4"
"""The activations of the published W4A4 arithmetic."""


@dataclass(frozen=True)
class ErrorRequest:
    """Everything that `tonfa bench error` was asked for."""

    model: str
    blocks: tuple[int, int] | None
    """Double and single blocks of a random model; None for all."""
    height: int
    width: int
    text_tokens: int
    rank: int
    activations: Sequence[str]
    attention: str
    """Of all but the published arithmetic, whose attention is in 16 bits."""
    seed: int
    device: torch.device


def bench_error(request: ErrorRequest, say: Say) -> list[dict[str, Any]]:
    """One record for each policy: ||y - exact|| / ||exact|| of a bf16 step's output.

    `exact` is the step in float32 with activations that are not quantized, by the reference backend. "none" in bf16 is
    what the 16-bit arithmetic alone costs.
    """
    device = request.device
    with torch.no_grad():
        model = four_bit_model(request.model, request.rank, device, request.seed, request.blocks).set_cuda_graphs(False)
        rank = int(model.config.quantization_config["rank"])
        inputs = step_inputs(
            model.config, request.height, request.width, 1, request.text_tokens, device, seed=request.seed + 1
        )
        say(f"{request.model}: exact step in float32")
        exact = _exact(model, inputs)
        found: dict[str, tuple[float, str]] = {}
        for activations in dict.fromkeys((*request.activations, PUBLISHED)):
            started = time.perf_counter()
            model.set_activations(activations).set_attention(_attention(request, activations))
            output = model(**inputs)[0].float()
            finite(output, f"{activations} activations")
            error = float((output - exact).norm() / exact.norm())
            found[activations] = error, _backend(model)
            say(f"{activations} activations: {error:.4f} in {time.perf_counter() - started:.1f} s")
    case = {
        "kind": "step",
        "model": request.model if not Path(request.model).is_absolute() else Path(request.model).name,
        "size": [request.height, request.width],
        "text_tokens": request.text_tokens,
        "layers": [model.config["num_layers"], model.config["num_single_layers"]],
        "rank": rank,
        "seed": request.seed,
    }
    published = Timing.of([found[PUBLISHED][0]])
    return [
        record(
            bench="error",
            case={**case, "activations": activations},
            variant=Variant("int4", activations, rank, True, _attention(request, activations)).name,
            settings={
                "weights": "int4",
                "activations": activations,
                "attention": _attention(request, activations),
                "backend": backend,
            },
            timing=Timing.of([error]),
            device=device,
            baselines={PUBLISHED: published},
            unit="relative",
        )
        for activations, (error, backend) in found.items()
    ]


def _attention(request: ErrorRequest, activations: str) -> str:
    return SIXTEEN_BITS if activations == PUBLISHED else request.attention


def _exact(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The float32 step. The weights are bf16 numbers, so converting there and back changes none."""
    wide = {k: v.float() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    nn.Module.to(model.set_activations("none", "reference"), torch.float32)
    try:
        output: Tensor = model(**wide)[0]
    finally:
        nn.Module.to(model, torch.bfloat16)
    finite(output, "float32")
    return output


def _backend(model: Any) -> str:
    layer = next(m for m in model.modules() if isinstance(m, SVDQLinear))
    return layer.binding().kernels.backend
