"""The GPU tests of small shapes, with the device code running on the CPU (see `simulator.py`)."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import simulator
import test_cuda_flux as flux
import test_cuda_gpu as gpu
import torch

from tonfa import dispatch
from tonfa.kernels.cuda import compiler, launch

pytestmark = [
    pytest.mark.skipif(simulator.COMPILER is None, reason="needs g++"),
    pytest.mark.usefixtures("poisoned", "_simulated"),
]
BF16, FP16 = torch.bfloat16, torch.float16
OPS = (
    "quantize",
    "norm_modulate_quantize",
    "product",
    "product_gelu_quantize",
    "product_gate_residual",
    "product_norm_rope",
    "w4a16",
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulated")


@pytest.fixture
def _simulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tests in (gpu, flux):
        monkeypatch.setattr(tests, "GPU", "cpu")
    for op in OPS:
        module = importlib.import_module(f"tonfa.kernels.cuda.{op}")
        monkeypatch.setattr(module, "launch", simulator.launcher(folder))
    two = SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: two)


@pytest.mark.parametrize(
    ("k", "rows", "unsigned", "dtype"), [(64, 1, False, BF16), (192, 33, True, FP16), (1024, 40, False, FP16)]
)
def test_quantize(k: int, rows: int, unsigned: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    gpu.test_quantize(k, rows, unsigned, dtype, generator)


@pytest.mark.parametrize("rank", [0, 16, 48, 80, 5])
def test_ranks(rank: int, generator: torch.Generator) -> None:
    gpu.test_ranks(rank, generator)


@pytest.mark.parametrize(
    ("n", "k", "rows", "unsigned", "dtype"),
    [
        (8, 64, 1, False, BF16),
        (64, 128, 33, True, BF16),
        (72, 192, 130, False, FP16),
        (202, 448, 129, True, FP16),
        (1, 320, 2, False, BF16),
    ],
)
def test_product(n: int, k: int, rows: int, unsigned: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    gpu.test_product(n, k, rows, unsigned, dtype, generator)


@pytest.mark.parametrize("unsigned", [False, True], ids=["s4", "u4"])
def test_integers_are_exact(unsigned: bool, generator: torch.Generator) -> None:
    gpu.test_integers_are_exact(unsigned, generator)


@pytest.mark.parametrize("name", ["w4a4_128x128_r32", "w4a4_256x192_r32"])
def test_published_linear(name: str) -> None:
    gpu.test_published_linear(name)


def test_published_gelu_mlp() -> None:
    gpu.test_published_gelu_mlp()


@pytest.mark.parametrize(
    ("rows", "n", "rank", "dtype"),
    [(5, 1024, 0, BF16), (1, 64, 16, BF16), (130, 192, 32, FP16), (129, 1024, 80, BF16)],
)
def test_product_gelu_quantize(rows: int, n: int, rank: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    gpu.test_product_gelu_quantize(rows, n, rank, dtype, generator)


def test_gelu_over_its_range(generator: torch.Generator) -> None:
    gpu.test_gelu_over_its_range(generator)


@pytest.mark.parametrize(("length", "n", "dtype"), [(1, 128, BF16), (65, 200, FP16), (5, 202, BF16)])
def test_product_gate_residual(length: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    gpu.test_product_gate_residual(length, n, dtype, generator)


def test_float16_residuals_stay_finite(generator: torch.Generator) -> None:
    gpu.test_float16_residuals_stay_finite(generator)


@pytest.mark.parametrize(
    ("length", "heads", "size", "dtype"), [(1, 1, 128, BF16), (70, 2, 128, FP16), (5, 1, 64, BF16)]
)
def test_product_norm_rope(length: int, heads: int, size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    gpu.test_product_norm_rope(length, heads, size, dtype, generator)


@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "misaligned"])
def test_heads_are_written_to_their_place(skip: int, generator: torch.Generator) -> None:
    gpu.test_heads_are_written_to_their_place(skip, generator)


@pytest.mark.parametrize(("length", "k", "rank", "dtype"), [(1, 64, 16, FP16), (37, 320, 96, BF16)])
def test_norm_modulate_quantize(length: int, k: int, rank: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    gpu.test_norm_modulate_quantize(length, k, rank, dtype, generator)


@pytest.mark.parametrize(
    ("n", "k", "batch", "dtype"),
    [(1, 64, 1, BF16), (18, 128, 3, FP16), (192, 1088, 1, BF16), (140, 512, 4, FP16), (40, 192, 6, BF16)],
)
def test_w4a16(n: int, k: int, batch: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    gpu.test_w4a16(n, k, batch, dtype, generator)


@pytest.mark.parametrize(("sizes", "k", "batch"), [((130, 8, 18), 192, 6), ((8,) * 81, 64, 2)])
def test_w4a16_group_equals_its_linears(sizes: tuple[int, ...], k: int, batch: int, generator: torch.Generator) -> None:
    gpu.test_w4a16_group_equals_its_linears(sizes, k, batch, BF16, generator)


@pytest.mark.parametrize(("unsigned", "dtype"), [(False, BF16), (False, FP16), (True, BF16), (True, FP16)])
def test_adversarial_inputs(unsigned: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    gpu.test_adversarial_inputs(unsigned, dtype, generator)


@pytest.mark.parametrize("name", ["awq_adanorm_zero_6x128_1024", "awq_adanorm_zero_6x128_256_padded_groups"])
def test_published_modulation(name: str) -> None:
    gpu.test_published_modulation(name)


def test_a_row_of_nan_stays_alone(generator: torch.Generator) -> None:
    gpu.test_a_row_of_nan_stays_alone(generator)


def test_a_shared_input_is_quantized_once(generator: torch.Generator) -> None:
    gpu.test_a_shared_input_is_quantized_once(generator)


def test_no_rows_are_no_error(generator: torch.Generator) -> None:
    gpu.test_no_rows_are_no_error(generator)


def test_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_reason_against", lambda *_: None)
    for module in (compiler, launch):
        monkeypatch.setattr(module, "problem", lambda: None)
    monkeypatch.setattr(
        flux, "SMALL", {**flux.SMALL, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    )
    flux.test_a_step(32, (32, 48), 5, BF16)
