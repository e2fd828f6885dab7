"""Where the CUDA backend is chosen, and what it says where it is not."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support import outlier_input, pretend_gpu, random_modulation, random_weights
from tonfa import dispatch
from tonfa.errors import UnsupportedError
from tonfa.kernels.cuda import backend, compiler, launch
from tonfa.ops.activation import InputWeights
from tonfa.weights import SVDQWeights, W4A16Weights

GPU = torch.device("cuda", 0)


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[int, int]:
    pretend_gpu(monkeypatch, request.param)
    for module in (compiler, launch):
        monkeypatch.setattr(module, "problem", lambda: None)
    dispatch._warn_once.cache_clear()
    return request.param


def input_weights(w: SVDQWeights) -> InputWeights:
    return InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "int4")


def note(activations: str = "int4", device: torch.device = GPU) -> tuple[bool, str]:
    (row,) = (r for r in dispatch.report(device, activations) if (r.backend, r.op) == ("cuda", "product"))
    return row.runs, row.note


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9)], indirect=True)
def test_where_tensor_cores_have_int4_it_is_the_default(capability: tuple[int, int]) -> None:
    assert dispatch.default_activations(GPU) == "int4"
    assert dispatch.bind(GPU, "int4") is dispatch.bind(GPU, "int4", backend="cuda")
    assert dispatch.bind(GPU, "int4").backend == "cuda" and note() == (True, "kernel")
    assert dispatch.bind(GPU, "int8").backend != "cuda"
    assert note("int8") == (False, "activations='int8' is not among its int4")


@pytest.mark.parametrize("capability", [(9, 0)], indirect=True)
def test_where_int4_is_emulated_it_must_be_asked_for(capability: tuple[int, int]) -> None:
    assert dispatch.default_activations(GPU) == "fp8"
    assert dispatch.bind(GPU, "int4").backend != "cuda"
    assert dispatch.bind(GPU, "int4", backend="cuda").backend == "cuda"
    assert note() == (False, "only if asked for by backend='cuda': sm_90 emulates INT4 products, exact but slow")


@pytest.mark.parametrize("capability", [(7, 5), (10, 0), (12, 0)], indirect=True)
def test_other_architectures_are_refused(capability: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedError, match="has no INT4 tensor cores .* choose activations='int8'"):
        dispatch.bind(GPU, "int4", backend="cuda")
    assert dispatch.default_activations(GPU) == ("int8" if capability < (8, 9) else "fp8")


@pytest.mark.parametrize("capability", [(8, 6)], indirect=True)
@pytest.mark.parametrize("module", [compiler, launch], ids=["compiler", "driver"])
def test_what_is_missing_is_said_once_and_the_next_backend_is_taken(
    capability: tuple[int, int], module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reason = "cuda-bindings is not installed: pip install 'tonfa[cuda]'"
    monkeypatch.setattr(module, "problem", lambda: reason)
    for _ in range(2):
        assert dispatch.bind(GPU, "int4").backend == "reference" and note() == (False, reason)
        assert dispatch.default_activations(GPU) == "int8"
    assert [record.getMessage() for record in caplog.records] == [
        f"activations='int4' on cuda:0: backend reference computes, because {reason}",
        f"activations are quantized to int8 instead of int4 on cuda:0: {reason}",
    ]
    with pytest.raises(UnsupportedError, match="nothing computes .* cuda-bindings is not installed"):
        dispatch.bind(GPU, "int4", backend="cuda")


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (13000, None),
        (14020, None),
        (12040, "made for CUDA 12.4, NVRTC is 13.0: .* 'cuda-bindings<13' nvidia-cuda-nvrtc-cu12"),
        (None, "the NVIDIA driver cannot be asked .*: update it"),
    ],
)
def test_the_driver_must_not_be_older_than_the_compiler(
    version: int | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> tuple[int, int]:
        if version is None:
            raise RuntimeError('Function "cuDriverGetVersion" not found')
        return (0, version)

    monkeypatch.setattr(launch, "_driver", lambda: SimpleNamespace(cuDriverGetVersion=ask))
    monkeypatch.setattr(launch, "compiler_version", lambda: "13.0")
    found = launch.problem.__wrapped__()
    assert found is None if expected is None else re.search(expected, found)


@pytest.mark.parametrize("capability", [(8, 6)], indirect=True)
def test_float32_layers_are_computed_by_the_reference_and_the_log_says_so_once(
    capability: tuple[int, int], caplog: pytest.LogCaptureFixture, generator: torch.Generator
) -> None:
    backend._warn_once.cache_clear()
    ours, theirs = (dispatch.bind(GPU, "int4", backend=name) for name in ("cuda", "reference"))
    w = random_weights(256, 64, generator=generator, dtype=torch.float32)
    following = random_weights(64, 256, generator=generator, dtype=torch.float32, unsigned=True)
    x = outlier_input(6, 64, generator, torch.float32)
    scale, gate = torch.randn(2, 64, generator=generator), torch.randn(2, 256, generator=generator)
    residual, modulation = torch.randn(2, 3, 256, generator=generator), random_modulation(64, 64, generator=generator)
    modulation = W4A16Weights(
        **{name: t.float() if t.is_floating_point() else t for name, t in vars(modulation).items()}
    )

    def run(kernels: dispatch.Kernels) -> list[torch.Tensor]:
        packed, inputs = kernels.pack_product(w), kernels.pack_input(input_weights(w))
        normed = kernels.norm_modulate_quantize(x.view(2, 3, 64), scale, scale, inputs)
        hidden = kernels.product_gelu_quantize(normed, packed, kernels.pack_input(input_weights(following)))
        return [
            kernels.product(kernels.quantize(x, inputs), packed),
            kernels.product(hidden, kernels.pack_product(following)),
            kernels.product_gate_residual(normed, packed, residual, gate),
            kernels.w4a16(x, kernels.pack_w4a16(modulation)),
            *kernels.w4a16_group(x, kernels.pack_w4a16_group([kernels.pack_w4a16(modulation)] * 2)),
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(ours), run(theirs), strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        "layers with torch.float32 weights are computed by the reference, slowly: take .to(torch.bfloat16)"
    ]


def test_it_computes_on_no_other_device() -> None:
    assert note(device=torch.device("cpu")) == (False, "it computes on CUDA GPUs, not on cpu")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA")
def test_a_pytorch_without_cuda_is_said() -> None:
    assert "this build of PyTorch has no CUDA" in backend.BACKEND.reason_against(GPU, "int4")


def test_what_is_wrong_with_the_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise RuntimeError("libnvrtc.so.13 not found\nsearched everywhere")

    def missing() -> str:
        raise ModuleNotFoundError("No module named 'cuda'")

    for function, expected in (
        (broken, "NVRTC cannot be loaded (libnvrtc.so.13 not found)"),
        (missing, "cuda-bindings"),
    ):
        monkeypatch.setattr(compiler, "compiler_version", function)
        compiler.problem.cache_clear()
        assert (compiler.problem() or "").startswith(expected) and "pip install 'tonfa[cuda]'" in compiler.problem()
    compiler.problem.cache_clear()


def test_importing_tonfa_and_its_kernels_needs_none_of_it() -> None:
    code = """
import sys
sys.modules["cuda"] = None
import tonfa, tonfa.dispatch, tonfa.kernels.cuda.catalog, tonfa.kernels.cuda.launch
assert len(tonfa.kernels.cuda.catalog.kernels()) > 20
from tonfa.kernels.cuda import compiler
print(compiler.problem())
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "cuda-bindings is not installed: pip install 'tonfa[cuda]'", done.stderr
