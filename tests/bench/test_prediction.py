"""The model of the INT4 kernels against numbers worked out by hand, the tables of the docs, and where it is printed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bench_cases import request
from rich.console import Console

from tonfa.bench import linear, prediction
from tonfa.bench.prediction import GPUS, Gpu, linear_ms, product_ms, quantize_ms, step_ms, w4a16_ms
from tonfa.bench.protocol import Timing
from tonfa.bench.step import StepBench, StepCase
from tonfa.bench.synthetic import FULL
from tonfa.cli.bench_tables import print_records
from tonfa.layers.linear import SVDQLinear

DOCS = (Path(__file__).parents[2] / "docs" / "int4-performance.md").read_text("utf-8")
SHAPES = {
    "product_norm_rope": (9216, 3072),
    "product_gate_residual": (3072, 3072),
    "product_gelu_quantize": (12288, 3072),
    "product_gate_residual ": (3072, 12288),
}
M, RANK = 4608, 32
FAST = Gpu("FAST", 2, 1e9, 1e15, 1e15, 32)
SLOW = Gpu("SLOW", 2, 1e9, 1e6, 1e15, 32)


def test_a_product_is_waves_of_tiles() -> None:
    """Five tiles on two processors with two blocks each are two waves of two tiles."""
    tile = 48 * 512 / 0.85 + 2 * 32 * 32 + 750 + 750
    assert product_ms(FAST, 128, 5 * 128, 3072, 32) == pytest.approx(2 * 2 * tile / 1e6)
    assert product_ms(FAST, 1, 1, 64, 0) == pytest.approx(2 * (512 / 0.85 + 1500) / 1e6)
    after = 750 + 4500 + 512 / 0.85 + 3 * 32 * 32
    assert product_ms(FAST, 128, 128, 64, 16, "product_gelu_quantize", 32) == pytest.approx(2 * after / 1e6, rel=1e-4)


def test_where_memory_is_slow_traffic_counts() -> None:
    codes = (100 + 256) * 128 * (0.5 + 2 / 64) + (100 * 4 + 256 * 2) * 16
    assert product_ms(SLOW, 100, 256, 128, 16) == pytest.approx((codes + 2 * 100 * 256) / 850)
    assert product_ms(SLOW, 100, 256, 128, 16, "product_gate_residual") == pytest.approx((codes + 4 * 100 * 256) / 850)
    assert quantize_ms(SLOW, 100, 128, 16) == pytest.approx((100 * 128 * (2.5 + 2 / 64) + 4 * 100 * 16) / 850)
    assert w4a16_ms(SLOW, 5, 64, 128) == pytest.approx(2 * 64 * 128 * (0.5 + 4 / 64) / 850)


def test_quantizing_is_bound_by_instructions_or_the_tensor_core_where_memory_is_fast() -> None:
    assert quantize_ms(FAST, 32, 64, 32) == pytest.approx(1061 / 8 / 1e6)
    assert quantize_ms(FAST, 32, 64, 64) == pytest.approx(64 * 32 / 8 / 1e6)
    assert quantize_ms(FAST, 33, 64, 128) == pytest.approx(2 * 2 * 64 * 32 / 8 / 1e6)
    assert w4a16_ms(FAST, 1, 64, 1088) == pytest.approx(2 * 9 * 16 * 32 / 8 / 1e6)


def test_a_step_is_the_sum_of_its_linears() -> None:
    gpu = GPUS[0]
    parts = step_ms(gpu, {**FULL, "num_layers": 0, "num_single_layers": 1}, 1024, 1024, 1, 512, RANK)
    kernels = [
        product_ms(gpu, M, n, k, RANK, name.strip(), RANK if "gelu" in name else 0) for name, (n, k) in SHAPES.items()
    ]
    assert parts["products"] == pytest.approx(sum(kernels))
    inputs = quantize_ms(gpu, M, 3072, 2 * RANK, "norm_modulate_quantize") + quantize_ms(gpu, M, 3072, RANK)
    assert parts["quantize"] == pytest.approx(inputs)
    assert parts["modulation"] == pytest.approx(w4a16_ms(gpu, 1, 3 * 3072, 3072))
    assert parts["attention"] == pytest.approx(4 * M**2 * 3072 / (0.75 * 71e12) * 1e3)


@pytest.mark.parametrize(
    ("name", "processors", "expected"),
    [
        ("NVIDIA GeForce RTX 3090", 82, "RTX 3090"),
        ("NVIDIA A100-SXM4-80GB", 108, "A100"),
        ("NVIDIA GeForce RTX 4090", 128, "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 76, None),
        ("NVIDIA H200", 132, None),
    ],
)
def test_gpus_are_known_by_name_and_size(
    name: str, processors: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    properties = SimpleNamespace(multi_processor_count=processors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    found = prediction.known_gpu(torch.device("cuda"))
    assert (found.name if found else None) == expected
    assert prediction.known_gpu(torch.device("cpu")) is None


def row(name: str) -> list[str]:
    """The cells behind the first of the docs' table row that begins so."""
    (line,) = [line for line in DOCS.splitlines() if line.startswith(f"| {name} |")]
    return re.findall(r"[\d.]+(?: / [\d.]+)?", line.removeprefix(f"| {name} |").replace("*", ""))


@pytest.mark.parametrize("kernel", SHAPES)
def test_the_docs_show_what_the_model_gives_for_each_product(kernel: str) -> None:
    n, k = SHAPES[kernel]
    name, rank = kernel.strip(), RANK if "gelu" in kernel else 0
    cells = []
    for gpu in GPUS:
        floor = M * n * k / 128 / 128 / 64 * 512 / gpu.processors / gpu.clock * 1e3
        cells.append(f"{floor:.2f} / {product_ms(gpu, M, n, k, RANK, name, rank):.2f}")
    assert row(f"{name}, {n} x {k}") == cells


def test_the_docs_show_what_the_model_gives_for_the_rest() -> None:
    cases = {
        "quantize, 3072": lambda gpu: quantize_ms(gpu, M, 3072, RANK),
        "norm_modulate_quantize, 3072, two branches": lambda gpu: quantize_ms(
            gpu, M, 3072, 2 * RANK, "norm_modulate_quantize"
        ),
        "w4a16, 18432 x 3072": lambda gpu: w4a16_ms(gpu, 1, 18432, 3072),
    }
    for name, of in cases.items():
        assert row(name) == [f"{of(gpu):.3f}" for gpu in GPUS]
    steps = [step_ms(gpu, FULL, 1024, 1024, 1, 512, RANK) for gpu in GPUS]
    for part in steps[0]:
        assert row(part) == [f"{step[part]:.1f}" for step in steps]
    assert row("**together**") == [f"{sum(step.values()):.0f}" for step in steps]


def test_predictions_stand_beside_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "known_gpu", lambda device: GPUS[0])
    bench = StepBench(request(config=FULL), lambda _: None)
    case, settings = StepCase(1024, 1024, 1, 512), {"backend": "cuda", "rank": RANK}
    found = bench._prediction(case, settings)
    assert found["value"] == pytest.approx(sum(step_ms(GPUS[0], FULL, 1024, 1024, 1, 512, RANK).values()), abs=1e-3)
    assert bench._prediction(case, {**settings, "backend": "triton"}) is None

    asked = linear.LinearRequest(256, 128, 64, 16, "int4", [], 1, 0, torch.device("cpu"))
    layer = SVDQLinear(128, 256, 16, activations="int4", backend="reference")
    timings = {"tonfa": Timing.of([2.0]), "torch-bf16": Timing.of([3.0])}
    assert not any("prediction" in line for line in linear._records(asked, layer, "int4", timings))
    monkeypatch.setattr(layer, "binding", lambda: SimpleNamespace(kernels=SimpleNamespace(backend="cuda")))
    ours, theirs = linear._records(asked, layer, "int4", timings)
    assert ours["prediction"]["value"] == pytest.approx(linear_ms(GPUS[0], 64, 256, 128, 16), abs=1e-4)
    assert "prediction" not in theirs
    parts = {
        "products": {"value": 4.0, "busy": 4.5, "floor": 1.0, "why": "work"},
        "idle": {"value": 1.0, "busy": 0.0, "floor": 0.0, "why": "none"},
    }
    step = {**ours, "bench": "step", "prediction": found, "parts": parts, "floor": {"value": 1.0}}
    console = Console(width=200)
    with console.capture() as captured:
        print_records([ours, theirs, step], console)
    text = captured.get()
    assert text.count("predicted") == 3 and f"{ours['prediction']['value']:.4g}" in text
    (line,) = [line for line in text.splitlines() if line.startswith("products ")]
    assert line.split()[1:6] == ["4.000", "4.500", f"{found['parts']['products']:.3f}", "1.000", "3.000"]
