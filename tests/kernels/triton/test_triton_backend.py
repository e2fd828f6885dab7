"""What the Triton backend says of itself, and how layers run on it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from triton_cases import POLICIES, layer

from support import outlier_input, pretend_gpu, relative_error
from tonfa import dispatch
from tonfa.kernels.attention import sdpa
from tonfa.kernels.triton.backend import BACKEND
from tonfa.kernels.triton.scratch import Scratch
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import W4A16Linear

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("number", "activations", "backend"),
    [
        ((8, 0), "int8", "triton"),
        ((8, 6), "fp8", "reference"),
        ((8, 9), "fp8", "triton"),
        ((9, 0), "int8", "triton"),
        ((10, 0), "fp8", "triton"),
        ((9, 0), "int4", "reference"),
        ((7, 5), "int8", "reference"),
    ],
)
def test_which_gpus_it_runs_on(
    number: tuple[int, int], activations: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch, number)
    assert dispatch.bind(CUDA, activations).backend == backend


def test_its_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(device: torch.device, activations: str) -> str:
        return next(r.note for r in dispatch.report(device, activations) if r.backend == "triton")

    pretend_gpu(monkeypatch, (8, 6))
    assert reason(CUDA, "fp8") == "activations='fp8' need a GPU of compute capability 8.9, this one has 8.6"
    assert reason(CUDA, "int8") == "kernel"
    assert reason(torch.device("cpu"), "int8") == "it computes on CUDA GPUs, not on cpu"
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "tonfa.kernels.triton.backend.find_spec", lambda name: None if name == "triton" else find_spec(name)
    )
    assert reason(CUDA, "int8") == "triton is not installed: pip install triton"


def test_dispatch_does_not_import_triton() -> None:
    code = "import sys, tonfa.dispatch; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("activations", POLICIES)
def test_its_attention_is_that_of_all_models_in_16_bits(activations: str) -> None:
    assert BACKEND.table(activations)["attention"] is sdpa.attention


def test_the_buffer_grows_and_keeps_what_graphs_may_hold(device: torch.device) -> None:
    scratch = Scratch()
    scratch.reserve(device, 100)
    first = scratch.empty(device, 4, 16, torch.int8)
    assert scratch.empty(device, 10, 10, torch.int8).data_ptr() == first.data_ptr() and scratch.nbytes() == 100
    assert scratch.empty(device, 16, 16, torch.int8).data_ptr() != first.data_ptr() and scratch.nbytes() == 356
    assert scratch.empty(device, 4, 16, torch.int8).shape == (4, 16)


def test_threads_do_not_share_a_buffer(device: torch.device) -> None:
    scratch = Scratch()
    own = scratch.empty(device, 4, 16, torch.int8)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(scratch.empty, device, 4, 16, torch.int8).result()
    assert scratch.empty(device, 4, 16, torch.int8).data_ptr() == own.data_ptr() != other.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("activations", POLICIES)
def test_layers_give_what_the_reference_backend_gives(activations: str, generator: torch.Generator) -> None:
    w = layer(192, 256, 32, CUDA, generator, torch.bfloat16, unsigned=True)
    x = outlier_input(21, 256, generator).view(3, 7, 256).to(CUDA)
    linear = SVDQLinear.from_weights(w, activations=activations, backend="triton")
    found = linear(x)
    linear.set_activations(activations, backend="reference")
    assert relative_error(found, linear(x)) < 2**-7


@pytest.mark.gpu
def test_the_modulation_runs_on_it(generator: torch.Generator) -> None:
    linear = W4A16Linear(64, 192, device=CUDA)
    for parameter in (linear.wscales, linear.wzeros, linear.bias):
        torch.nn.init.normal_(parameter)
    linear.qweight.copy_(torch.randint(0, 256, linear.qweight.shape, generator=generator))
    x = torch.randn(2, 64, generator=generator).bfloat16().to(CUDA)
    weight, bias = linear.weights().dense(torch.float64)
    kernels = dispatch.bind(CUDA, "fp8", "triton")
    found = kernels.w4a16(x, kernels.pack_w4a16(linear.weights()))
    assert relative_error(found, x.double() @ weight.T + bias) < 2**-8
