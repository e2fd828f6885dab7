"""Kernels by part, and the floors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bench_cases import H200

from tonfa.bench.ceilings import Ceilings
from tonfa.bench.parts import IDLE, PARTS, Kernel, Shares, by_part, classify, described, floors, last
from tonfa.bench.synthetic import FULL
from tonfa.bench.work import flux_work

KERNELS = {
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)": "attention",
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNN": "products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas": "products",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<...>>": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "products",
    "product_gelu_quantize_kernel": "products",
    "_product_norm_rope": "products",
    "expand_int4_to_fp8": "expand",
    "_widen_kernel": "expand",
    "_quantize_rows": "quantize",
    "norm_modulate_quantize_kernel": "quantize",
    "add_lowrank": "quantize",
    "add_partials": "quantize",
    "quantize_known": "quantize",
    "_measure": "quantize",
    "_round": "quantize",
    "attention_center": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_fp8_fprop_wgmma_e4m3_knob_3_64x128x128": "attention",
    "product": "products",
    "expand": "expand",
    "w4a16_kernel": "modulation",
    "void at::native::round_kernel_cuda": "rest",
    "void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>": "rest",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>": "rest",
    "Memcpy DtoD (Device -> Device)": "rest",
}


@pytest.mark.parametrize(("kernel", "part"), KERNELS.items())
def test_classification(kernel: str, part: str) -> None:
    assert classify(kernel) == part


def in_turn(*kernels: tuple[str, float]) -> list[Kernel]:
    """One after another, from 7 ms on."""
    found, at = [], 7.0
    for name, elapsed in kernels:
        found.append(Kernel(name, at, at + elapsed))
        at += elapsed
    return found


def test_times_of_a_part_add_up() -> None:
    sums = by_part(in_turn(("nvjet_a", 1.5), ("gemm_b", 2.0), ("w4a16", 0.25), ("copy", 4.0)))
    expected = {**dict.fromkeys(PARTS, 0.0), "products": 3.5, "modulation": 0.25, "rest": 4.0}
    assert sums == {name: Shares(value, value) for name, value in expected.items()}


def test_time_that_kernels_share_counts_once() -> None:
    """Of the one that started first, whatever order they are listed in, and whether it covers the other or not."""
    kernels = [
        Kernel("flash", 9.0, 12.0),  # starts 1 ms before the product ends
        Kernel("product", 0.0, 10.0),
        Kernel("expand", 2.0, 5.0),  # hidden by the product
        Kernel("quantize", 15.0, 16.0),  # after 3 ms of nothing
        Kernel("copy", 15.0, 17.0),  # starts with it and lasts longer
    ]
    expected = {
        "products": Shares(10.0, 10.0),
        "attention": Shares(2.0, 3.0),
        "expand": Shares(0.0, 3.0),
        "quantize": Shares(1.0, 1.0),
        "rest": Shares(1.0, 2.0),
    }
    for order in (kernels, kernels[::-1]):
        assert {name: share for name, share in by_part(order).items() if share.busy} == expected
    parts, _ = described(kernels, 17.0, dict.fromkeys(PARTS, (0.0, "")))
    assert parts[IDLE]["value"] == 3.0 and sum(part["value"] for part in parts.values()) == 17.0
    assert (parts["expand"]["value"], parts["expand"]["busy"]) == (0.0, 3.0)


def test_shares_of_a_step_that_the_profiler_slowed_down() -> None:
    kernels = in_turn(("product", 30.0), ("flash", 10.0))
    parts, _ = described(kernels, 20.0, dict.fromkeys(PARTS, (0.0, "")))
    assert {name: part["value"] for name, part in parts.items() if part["value"]} == {
        "products": 15.0,
        "attention": 5.0,
    }


def test_kernels_of_the_last_of_several_steps() -> None:
    steps = [in_turn(("product", 1.0 + i), ("flash", 2.0)) for i in range(3)]
    found = [Kernel(k.name, k.start + 100 * i, k.end + 100 * i) for i, step in enumerate(steps) for k in step]
    assert last(found[::-1], 3) == found[-2:]


WORK = flux_work(FULL, 1024, 1024, 1, 512, 32)


def test_floors_of_flux_on_an_h200() -> None:
    least = {name: value for name, (value, _) in floors(WORK, H200, "int4", "fp8").items()}
    assert least["products"] == pytest.approx(59.49e12 / 1371e12 * 1e3 + 0.826e12 / 782e12 * 1e3, rel=1e-3)
    assert least["attention"] == pytest.approx(24.4, abs=0.1)
    assert least["expand"] == pytest.approx(1.07, abs=0.01)  # 4.57 GB once
    assert least["quantize"] == pytest.approx(1.32, abs=0.01)  # 5.65 GB
    assert least["modulation"] == pytest.approx(0.42, abs=0.01)
    assert least[IDLE] == 0


def test_floor_of_fp8_attention() -> None:
    assert floors(WORK, H200, "int4", "fp8", "fp8")["attention"] == floors(WORK, H200, "int4", "fp8")["attention"]
    measured = replace(H200, attention_fp8=903e12)
    value, why = floors(WORK, measured, "int4", "fp8", "fp8")["attention"]
    assert value == pytest.approx(WORK.attention_flops / 903e12 * 1e3) and "FP8" in why
    assert "BF16" in floors(WORK, measured, "int4", "fp8")["attention"][1]


def test_rate_follows_the_activations_and_expansion_the_residency() -> None:
    def products(activations: str) -> float:
        return floors(WORK, H200, "fp8", activations)["products"][0]

    assert products("fp8") < products("none") < products("int8")
    assert floors(WORK, H200, "fp8", "fp8")["expand"][0] == 0
    assert floors(WORK, H200, "int4", "int4")["expand"][0] == 0
    without = Ceilings(bandwidth=1e12, bf16=100e12, fp8=None, int8=None, attention=1e12)
    assert floors(WORK, without, "int4", "fp8")["products"][1].count("BF16") == 2


def test_parts_of_a_record_sum_to_the_step() -> None:
    least = floors(WORK, H200, "int4", "fp8")
    parts, floor = described(in_turn(("nvjet", 50.0), ("flash", 25.0), ("other", 5.0)), 90.0, least)
    assert list(parts) == list(PARTS)
    assert sum(part["value"] for part in parts.values()) == pytest.approx(90.0)
    assert parts[IDLE]["value"] == 10.0 and parts["products"]["value"] == 50.0
    assert floor["value"] == pytest.approx(sum(part["floor"] for part in parts.values()), abs=1e-3)
    assert "59.5 TFLOP at 1371 TFLOP/s (FP8 row-wise)" in floor["why"]
    assert "0.00" not in parts["attention"]["why"]
