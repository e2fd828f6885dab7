"""Candidates of a step: the ways to run it, full memory, time limits, and the way from 16 bits to ours."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from bench_cases import CPU, TINY, VARIANT, request

from tonfa.bench import step, variant
from tonfa.bench.dense import EAGER, EAGER_CUDNN, DenseModels
from tonfa.bench.protocol import Timing
from tonfa.bench.step import StepBench, StepCase
from tonfa.bench.synthetic import step_inputs
from tonfa.bench.variant import Variant, build, check, variants
from tonfa.bench.waterfall import bars, bench_waterfall
from tonfa.dispatch import bind, composed
from tonfa.errors import UnsupportedError
from tonfa.ops.table import OPS, AttentionKernels

CASES = [StepCase(32, 48, 1, 8), StepCase(48, 48, 2, 8)]
OURS = VARIANT.name
UNFUSED = replace(VARIANT, fused=False)


def test_names_tell_variants_apart() -> None:
    assert OURS == "tonfa int4 weights, int8 activations"
    last = Variant("fp8", "fp8", 0, graph=False, attention="fp8", fused=False)
    assert last.name == (
        "tonfa fp8 weights, fp8 activations, fp8 attention, nothing fused, no graph, no low-rank branch"
    )
    (found,) = variants(["int4"], None, 32, True, CPU, "auto")
    assert found == VARIANT and found.attention == "sdpa"


def test_nothing_fused_computes_the_same() -> None:
    kernels = bind(CPU, "int8")
    alone = composed(kernels)
    assert alone is composed(kernels) and alone.product is kernels.product and alone.backend == kernels.backend
    fusions = [op for op in OPS if getattr(alone, op) is not getattr(kernels, op)]
    assert {"norm_modulate_quantize", "product_gelu_quantize", "product_norm_rope"} <= set(fusions)
    assert not {"quantize", "product", "w4a16", "attention"} & set(fusions)
    inputs = step_inputs(TINY, 32, 48, text_tokens=8)
    with torch.no_grad():
        fused, unfused = (build(v, TINY, CPU, 0)(**inputs)[0].float() for v in (VARIANT, UNFUSED))
    assert 0 < float((fused - unfused).norm() / fused.norm()) < 0.01
    assert check(UNFUSED, TINY, CPU, 0) < 0.01


def out_of_memory(*_: object, **__: object) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")


def test_a_case_that_does_not_fit_is_left_out_for_that_candidate_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = step.Candidate.step

    def full(candidate: step.Candidate, inputs: dict[str, Any]) -> torch.Tensor:
        if candidate.name == EAGER and inputs["hidden_states"].shape[0] == 2:
            out_of_memory()
        return forward(candidate, inputs)

    monkeypatch.setattr(step.Candidate, "step", full)
    said: list[str] = []
    records = list(StepBench(request(cases=CASES, baselines=[EAGER]), said.append).run())
    assert [(r["variant"], r["case"]["batch"], list(r["baselines"])) for r in records] == [
        (OURS, 1, [EAGER]),
        (EAGER, 1, [EAGER]),
        (OURS, 2, []),
    ]
    assert "skipped bf16-eager at 48 x 48, batch 2: CUDA out of memory. Tried to allocate 9 GiB." in said


def test_our_case_that_does_not_fit_leaves_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = step.memory.step_memory

    def full(model: Any, inputs: dict[str, Any], *others: Any) -> dict[str, float]:
        ours = type(model).__name__.startswith("SVDQ")
        return out_of_memory() if ours and inputs["hidden_states"].shape[0] == 1 else measure(model, inputs, *others)

    monkeypatch.setattr(step.memory, "step_memory", full)
    records = list(StepBench(request(cases=CASES, baselines=[EAGER]), print).run())
    assert [(r["variant"], r["case"]["batch"]) for r in records] == [(EAGER, 1), (OURS, 2), (EAGER, 2)]


def test_models_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(DenseModels, "build", out_of_memory)
    (ours,) = StepBench(request(baselines=[EAGER]), said.append).run()
    assert ours["variant"] == OURS and ours["baselines"] == {}
    assert "skipped baseline bf16-eager: CUDA out of memory. Tried to allocate 9 GiB." in said
    monkeypatch.setattr(step, "build", out_of_memory)
    with pytest.raises(UnsupportedError, match="none of the variants"):
        list(StepBench(request(), said.append).run())


def test_models_are_built_once_for_all_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        return lambda *arguments, **options: (calls.update([name]), function(*arguments, **options))[1]

    monkeypatch.setattr(step, "build", counted("ours", step.build))
    monkeypatch.setattr(DenseModels, "build", counted("dense", DenseModels.build))
    assert len(list(StepBench(request(cases=CASES, baselines=[EAGER]), print).run())) == 4
    assert calls == {"ours": 1, "dense": 1}


def test_graphs_of_a_case_are_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    timed = StepBench._timed
    monkeypatch.setattr(step.Candidate, "forget_graphs", lambda candidate: seen.append(candidate.name))
    monkeypatch.setattr(StepBench, "_timed", lambda *given: (seen.append("timed"), timed(*given))[1])
    list(StepBench(request(cases=CASES), print).run())
    assert seen == [OURS, OURS, "timed", OURS, "timed", OURS]


def test_attention_that_would_run_in_16_bits_is_not_timed_as_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []

    def takes(shape: torch.Size, _: torch.device) -> bool:
        shapes.append(shape)
        return shape[0] == 1

    kernels = AttentionKernels(bind(CPU, "int8").attention, takes, print)
    candidate = step.Candidate("x", {}, None, 0.0, replace(VARIANT, attention="fp8"))
    monkeypatch.setattr(step, "bind_attention", lambda *_: kernels)
    bench = StepBench(request(), print)
    assert [bench._reason_against(candidate, case) for case in CASES] == [
        None,
        "its fp8 attention does not take (2, 2, 17, 64)",
    ]
    assert shapes == [(1, 2, 14, 64), (2, 2, 17, 64)]


def test_the_way_to_the_fastest() -> None:
    last = Variant("fp8", "fp8", 32, graph=True, attention="fp8")
    way, ours = bars(last, gpu=True)
    assert [bar.candidate for bar in way] == [EAGER, EAGER_CUDNN, *(v.name for v in ours)]
    assert [bar.technique for bar in way] == [
        "16-bit weights, eager",
        "cuDNN's attention",
        "4-bit weights, FP8 products",
        "fused kernels",
        "CUDA graph",
        "FP8 attention",
        "weights kept in FP8",
    ]
    assert ours[-1] == last and len({v.name for v in ours}) == 5
    for before, after in pairwise(ours):
        changed = [name for name in before.__dict__ if getattr(before, name) != getattr(after, name)]
        assert len(changed) == 1
    short, _ = bars(replace(last, weights="int4", attention="sdpa"), gpu=True)
    assert [bar.technique for bar in short] == [bar.technique for bar in way[:5]]


def test_records_of_a_waterfall(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {EAGER: 30.0, replace(UNFUSED, graph=False).name: 20.0, replace(VARIANT, graph=False).name: 10.0}

    def timings(candidates: dict[str, Any], *_: object, **__: object) -> dict[str, Timing]:
        return {name: Timing(times.get(name, 5.0), 1.0, 50.0, 20) for name in candidates}

    monkeypatch.setattr(step, "interleaved", timings)
    monkeypatch.setattr(variant, "CHECK_SIZE", (32, 32))
    asked = request(variants=[replace(VARIANT, graph=False)])
    records = list(bench_waterfall(asked, ["rank-0"], print))
    found = {r["case"].get("bar"): (r["case"].get("technique"), r["value"], r["ratios"]) for r in records}
    assert found == {
        0: ("16-bit weights, eager", 30.0, {EAGER: 1.0, "rank-0": 0.167}),
        1: ("4-bit weights, INT8 products", 20.0, {EAGER: 1.5, "rank-0": 0.25}),
        2: ("fused kernels", 10.0, {EAGER: 3.0, "rank-0": 0.5}),
        None: (None, 5.0, {EAGER: 6.0, "rank-0": 1.0}),
    }
    assert {r["bench"] for r in records} == {"waterfall"} and all(r["parts"] == {} for r in records)
