"""From Diffusers' 16-bit step to ours, one technique after another: what each of them gains, in one run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tonfa.bench.dense import EAGER, EAGER_CUDNN
from tonfa.bench.protocol import Say
from tonfa.bench.step import StepBench, StepRequest
from tonfa.bench.variant import Variant


@dataclass(frozen=True)
class Bar:
    """A technique, added to all of those before it."""

    technique: str
    candidate: str
    """The name of a baseline or of a variant."""


def bars(last: Variant, gpu: bool) -> tuple[list[Bar], list[Variant]]:
    """Every bar on the way to `last`, and the variants among them. What `last` does without is left out."""
    quantized = replace(last, weights="int4", attention="sdpa", fused=False, graph=False)
    steps = [(f"4-bit weights, {last.activations.upper()} products", quantized)]

    def then(technique: str, **changes: Any) -> None:
        variant = replace(steps[-1][1], **changes)
        if variant != steps[-1][1]:
            steps.append((technique, variant))

    then("fused kernels", fused=True)
    then("CUDA graph", graph=last.graph)
    then("FP8 attention", attention=last.attention)
    then("weights kept in FP8", weights=last.weights)
    dense = [Bar("16-bit weights, eager", EAGER), *([Bar("cuDNN's attention", EAGER_CUDNN)] if gpu else [])]
    return [*dense, *(Bar(name, variant.name) for name, variant in steps)], [variant for _, variant in steps]


def bench_waterfall(request: StepRequest, references: Sequence[str], say: Say) -> Iterator[dict[str, Any]]:
    """One record for each bar and case, as `bench step` writes them, with `bar` (from 0) and `technique` in its case.

    The last of the request's variants is where the way ends. `references` are further baselines: they have records
    without a bar. What cannot run here is skipped.
    """
    way, variants = bars(request.variants[-1], request.device.type == "cuda")
    dense = [bar.candidate for bar in way][: len(way) - len(variants)]
    baselines = list(dict.fromkeys((*dense, *references)))
    asked = replace(request, variants=variants, baselines=baselines, explicit=bool(references), parts=False)
    places = {bar.candidate: (place, bar.technique) for place, bar in enumerate(way)}
    for line in StepBench(asked, say).run():
        yield {**line, "bench": "waterfall", "case": _placed(line["case"], places.get(line["variant"]))}


def _placed(case: Mapping[str, Any], place: tuple[int, str] | None) -> dict[str, Any]:
    return dict(case) if place is None else {**case, "bar": place[0], "technique": place[1]}
