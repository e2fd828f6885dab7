"""Choosing kernels: the preference, the reasons, the policies of each device."""

from __future__ import annotations

import pytest
import torch

from support import pretend_gpu
from tonfa import dispatch
from tonfa.errors import UnsupportedError
from tonfa.kernels.attention import choices
from tonfa.kernels.cuda import compiler, launch
from tonfa.ops.activation import ACTIVATIONS
from tonfa.ops.table import ATTENTIONS, OPS

CPU = torch.device("cpu")


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_the_reference_runs_everything_everywhere(activations: str) -> None:
    kernels = dispatch.bind(CPU, activations, backend="reference")
    assert (kernels.backend, kernels.activations) == ("reference", activations)
    assert all(callable(getattr(kernels, op)) for op in OPS)


def test_binding_is_done_once() -> None:
    assert dispatch.bind(CPU, "int4") is dispatch.bind(CPU, "int4")


def test_preference_follows_the_order_of_backends() -> None:
    rows = [r for r in dispatch.report(CPU, "int8") if r.op == "product" and r.runs]
    assert dispatch.bind(CPU, "int8").backend == rows[0].backend


def test_every_no_has_a_reason_and_every_yes_says_how() -> None:
    for activations in ACTIVATIONS:
        rows = dispatch.report(CPU, activations)
        assert len(rows) == len(OPS) * len(dispatch.BACKENDS) + len(ATTENTIONS) - 1
        for row in rows:
            assert row.note
            assert row.runs == (row.note in ("kernel", "composed of other ops"))
    assert not any(r.runs for r in dispatch.report(CPU, "fp8") if r.backend == "cpu")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="activations='int5' is unknown; choose one of int4, int8, fp8, none"):
        dispatch.bind(CPU, "int5")
    with pytest.raises(
        UnsupportedError, match="backend='rocm' is unknown; choose one of cpu, cuda, hopper, triton, reference"
    ):
        dispatch.bind(CPU, "int8", backend="rocm")


def test_attention_is_a_choice_with_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuple(c.name for c in choices.CHOICES) == tuple(ATTENTIONS)
    assert dispatch.bind_attention(CPU, "sdpa") is None
    with pytest.raises(UnsupportedError, match="attention='fp16' is unknown; choose one of sdpa, fp8"):
        dispatch.bind_attention(CPU, "fp16")
    with pytest.raises(
        UnsupportedError, match="attention='fp8' does not run on cpu: it computes on CUDA GPUs, not on cpu"
    ):
        dispatch.bind_attention(CPU, "fp8")
    gpu = torch.device("cuda")
    pretend_gpu(monkeypatch, (8, 9))
    with pytest.raises(UnsupportedError, match="needs sm_90 or newer, this GPU is sm_89"):
        dispatch.bind_attention(gpu, "fp8")
    pretend_gpu(monkeypatch, (9, 0))
    for package, remedy in (("triton", "pip install triton"), ("cudnn", r"pip install 'tonfa\[cudnn\]'")):
        monkeypatch.setattr(choices, "find_spec", lambda name, package=package: None if name == package else True)
        with pytest.raises(UnsupportedError, match=remedy):
            dispatch.bind_attention(gpu, "fp8")
        assert dispatch.bind_attention(gpu, "auto") is None


def test_attention_is_fp8_by_itself_where_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choices, "find_spec", lambda name: True)
    for capability, choice in (((8, 9), "sdpa"), ((9, 0), "fp8"), ((10, 0), "sdpa")):
        pretend_gpu(monkeypatch, capability)
        assert choices.automatic(torch.device("cuda")) == choice
    assert choices.automatic(CPU) == "sdpa" and dispatch.bind_attention(CPU, "auto") is None


def test_the_error_tells_what_was_tried() -> None:
    with pytest.raises(UnsupportedError, match="cpu: .*reference: the meta device computes nothing"):
        dispatch.bind(torch.device("meta"), "int8")


@pytest.mark.parametrize(
    ("capability", "activations"),
    [((7, 5), "int8"), ((8, 0), "int4"), ((8, 6), "int4"), ((8, 9), "int4"), ((9, 0), "fp8"), ((12, 0), "fp8")],
)
def test_default_policy_of_each_gpu(
    capability: tuple[int, int], activations: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, capability)
    for module in (compiler, launch):
        monkeypatch.setattr(module, "problem", lambda: None)
    assert dispatch.default_activations(torch.device("cuda")) == activations


def test_default_policy_of_the_cpu() -> None:
    assert dispatch.default_activations(CPU) == "int8"


@pytest.mark.parametrize(
    ("devices", "cuda", "index", "reason"),
    [
        (0, None, None, "no CUDA device: this build of PyTorch has no CUDA, install one from https://pytorch.org"),
        (0, "13.0", 0, "no CUDA device: PyTorch finds no GPU, check the driver with nvidia-smi"),
        (1, "13.0", 1, "no CUDA device 1: PyTorch finds 1, counted from 0"),
    ],
)
def test_a_gpu_that_is_not_there_is_a_reason(
    devices: int, cuda: str | None, index: int | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def capability(device: object) -> tuple[int, int]:
        raise AssertionError("Torch not compiled with CUDA enabled")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    gpu = torch.device("cuda") if index is None else torch.device("cuda", index)
    for activations in ACTIVATIONS:
        rows = dispatch.report(gpu, activations)
        assert not any(row.runs for row in rows)
        assert {row.note for row in rows if row.backend in ("reference", "fp8")} == {reason}
        with pytest.raises(UnsupportedError, match=reason):
            dispatch.bind(gpu, activations)
    with pytest.raises(UnsupportedError, match=f"nothing computes on {gpu}: {reason}"):
        dispatch.default_activations(gpu)
    assert dispatch.bind_attention(gpu, "auto") is None
    with pytest.raises(UnsupportedError, match=reason):
        dispatch.bind_attention(gpu, "fp8")
