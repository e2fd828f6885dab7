"""What the CPU backend says of itself, and how its kernels are run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import outlier_input, random_modulation, random_weights, relative_error
from tonfa import dispatch
from tonfa.kernels.cpu import team
from tonfa.kernels.cpu.quantize import kernel
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import W4A16Linear

CPU = torch.device("cpu")


def test_it_is_preferred_for_int8_on_the_cpu() -> None:
    assert dispatch.bind(CPU, "int8").backend == "cpu"
    rows = {r.op: r for r in dispatch.report(CPU, "int8") if r.backend == "cpu"}
    assert all(r.runs for r in rows.values())
    assert {r.op for r in rows.values() if r.note != "kernel"} == {"w4a16_group", "quantize_fp8"}


def test_without_numba_the_reference_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "tonfa.kernels.cpu.backend.find_spec", lambda name: None if name == "numba" else find_spec(name)
    )
    assert dispatch.bind(CPU, "int8").backend == "reference"
    notes = {r.note for r in dispatch.report(CPU, "int8") if r.backend == "cpu"}
    assert notes == {"numba is not installed: pip install 'tonfa[cpu]'"}


def test_it_computes_on_no_other_device() -> None:
    row = next(r for r in dispatch.report(torch.device("meta"), "int8") if r.backend == "cpu")
    assert not row.runs and row.note == "it computes on the CPU, not on meta"


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "after-gelu"])
def test_layers_give_what_the_reference_backend_gives(unsigned: bool, generator: torch.Generator) -> None:
    w = random_weights(200, 256, generator=generator, unsigned=unsigned)
    x = outlier_input(21, 256, generator).view(3, 7, 256)
    layer = SVDQLinear.from_weights(w)
    found = layer(x)
    assert layer.binding().kernels.backend == "cpu"
    layer.set_activations("int8", backend="reference")
    assert found.shape == (3, 7, 200)
    assert relative_error(found, layer(x)) < 2**-7


def test_the_modulation_runs_on_it(generator: torch.Generator) -> None:
    w = random_modulation(192, 64, generator=generator)
    layer = W4A16Linear(64, 192, device="meta")
    layer.load_state_dict(w.tensors(), assign=True)
    x = torch.randn(2, 64, generator=generator).bfloat16()
    weight, bias = w.dense(torch.float64)
    assert relative_error(layer(x), x.double() @ weight.T + bias) < 2**-8
    assert layer.binding().kernels.backend == "cpu"


def test_every_item_is_claimed_once_for_any_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(team, "_ELEMENTS_PER_THREAD", 1)
    for rows in (1, 2, 3, 17, 100):
        x, codes, scales = torch.ones(rows, 64), torch.empty(rows, 64, dtype=torch.int8), torch.empty(rows)
        team.launch(kernel(torch.float32), rows, 64, x, torch.ones(64), codes, scales, 64)
        assert (codes == 127).all() and scales.isfinite().all()


def test_kernels_run_where_torch_has_no_libgomp(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    w = random_weights(64, 128, generator=generator)
    x = outlier_input(300, 128, generator)
    layer = SVDQLinear.from_weights(w)
    expected = layer(x)
    monkeypatch.setattr(team, "_gomp_parallel", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert torch.equal(layer(x), expected)


def test_kernels_compile_where_nothing_can_be_cached(tmp_path: Path) -> None:
    """Numba refuses to cache in a directory that it cannot write; the kernel is then compiled in each process."""
    code = """
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
import torch
from tonfa.kernels.cpu.quantize import pack_input, quantize
from tonfa.ops.activation import InputWeights
w = InputWeights(torch.ones(64), torch.zeros(64, 1), False, "int8")
print(quantize(torch.ones(2, 64), pack_input(w)).codes.sum().item())
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert done.stdout.strip() == str(2 * 64 * 127), done.stderr
