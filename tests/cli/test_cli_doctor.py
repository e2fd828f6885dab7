"""`tonfa doctor` reports what dispatch would choose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tonfa.cli.doctor import compile_all, cpu_name, int8_is_exact
from tonfa.dispatch import BACKENDS, report
from tonfa.kernels.cuda import catalog, compiler
from tonfa.kernels.cuda.kernel import build
from tonfa.kernels.cuda.product_gelu_quantize import add_kernel
from tonfa.kernels.hopper import catalog as hopper
from tonfa.kernels.hopper import expand
from tonfa.ops.table import ATTENTIONS, OPS


def test_json_is_the_report_of_dispatch(tonfa) -> None:
    result = tonfa("doctor", "--device", "cpu", "--activations", "int8", "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    expected = [vars(row) for row in report(torch.device("cpu"), "int8")]
    assert facts["operations"] == expected and len(expected) == len(OPS) * len(BACKENDS) + len(ATTENTIONS) - 1
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["default_activations"] == "int8" and facts["device"] == "cpu"
    assert facts["cpu"]["name"] == cpu_name() != ""
    assert len(facts["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


@pytest.mark.parametrize("activations", ["int4", "int8", "fp8", "none"])
def test_table_names_every_operation(tonfa, activations: str) -> None:
    result = tonfa("doctor", "--device", "cpu", "--activations", activations)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for row in report(torch.device("cpu"), activations):
        (line,) = (line for line in lines if line.split()[:2] == [row.op, row.backend])
        assert ("yes" if row.runs else "no: " + row.note) in line
        assert ("(kernel)" in line) == (row.runs and row.note == "kernel")


def test_missing_packages_are_said(tonfa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tonfa.cli.doctor.PACKAGES", ("torch", "no-such-package"))
    assert "no-such-package not installed" in tonfa("doctor").stdout


def test_int8_products_are_checked() -> None:
    assert int8_is_exact()


def test_wrong_int8_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pairs = a.view(*a.shape[:-1], -1, 2).int().unsqueeze(1) * b.t().reshape(1, b.shape[1], -1, 2).int()
        return pairs.sum(-1).clamp(-(2**15), 2**15 - 1).sum(-1)

    monkeypatch.setattr("torch._int_mm", saturating)
    assert not int8_is_exact()


@pytest.mark.skipif(compiler.problem() is not None, reason=compiler.problem() or "")
def test_kernels_are_compiled_without_a_gpu(tonfa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TONFA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tonfa.kernels.cuda.catalog.kernels", lambda: [add_kernel()])
    first, second = (tonfa("doctor", "--device", "cpu", "--compile", "--arch", "86", "--json") for _ in range(2))
    compiled = [json.loads(result.stdout)["compiled"] for result in (first, second)]
    for facts, cached in zip(compiled, (False, True), strict=True):
        (row,) = facts["kernels"]
        assert facts["architecture"] == "sm_86" and facts["cache"] == str(tmp_path / "kernels")
        assert row["kernel"] == "add_partials[]" and row["cached"] == cached and row["bytes"] > 1000
    table = tonfa("doctor", "--device", "cpu", "--compile", "--arch", "86").stdout
    assert "Compiled for sm_86 by NVRTC" in table and "1 kernels, 0 compiled now in 0.0 s" in table


@pytest.mark.skipif(compiler.problem() is not None, reason=compiler.problem() or "")
def test_hoppers_kernels_are_compiled_without_a_gpu(tonfa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TONFA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tonfa.kernels.cuda.catalog.kernels", lambda: [add_kernel()])
    monkeypatch.setattr("tonfa.kernels.hopper.catalog.kernels", lambda multiprocessors: [expand.kernel()])
    result = tonfa("doctor", "--device", "cpu", "--compile", "--arch", "90", "--json")
    rows = json.loads(result.stdout)["compiled"]["kernels"]
    assert [(row["kernel"], row["cached"]) for row in rows] == [("add_partials[]", False), ("expand[]", False)]
    assert build(expand.kernel(), 90)[1] and rows[1]["bytes"] > 1000


@pytest.mark.parametrize(
    ("gpu", "arch", "multiprocessors"), [(90, None, 114), (90, 90, 114), (86, 90, 132), (None, 90, 132)]
)
def test_hoppers_kernels_are_those_of_the_gpu(
    gpu: int | None, arch: int | None, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or, where there is none, of most."""
    place = torch.device("cpu" if gpu is None else "cuda:0")
    monkeypatch.setattr(compiler, "problem", lambda: None)
    monkeypatch.setattr(compiler, "compiler_version", lambda: "13.0")
    monkeypatch.setattr("tonfa.cli.doctor.parse_device", lambda device: place)
    monkeypatch.setattr("tonfa.kernels.cuda.launch.architecture", lambda device: gpu)
    monkeypatch.setattr("tonfa.kernels.hopper.device_facts.multiprocessors", lambda device: 114)
    monkeypatch.setattr("tonfa.kernels.cuda.kernel.build", lambda kernel, arch: (f"{kernel} {arch}".encode(), False))
    found = compile_all("auto", arch)
    names = [str(kernel) for kernel in (*catalog.kernels(), *hopper.kernels(multiprocessors))]
    assert found["architecture"] == "sm_90" and [row["kernel"] for row in found["kernels"]] == names
    assert [row["kernel"] for row in compile_all("auto", 86)["kernels"]] == [str(k) for k in catalog.kernels()]


def test_compiling_needs_a_gpu_or_an_architecture(tonfa, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "problem", lambda: None)
    result = tonfa("doctor", "--device", "cpu", "--compile")
    assert result.exit_code == 1 and "cpu is no NVIDIA GPU; name an architecture, such as --arch 86" in result.stderr
    assert "give both" in tonfa("doctor", "--arch", "86").stderr
    monkeypatch.setattr(compiler, "problem", lambda: "no compiler")
    assert "--compile: no compiler" in tonfa("doctor", "--compile", "--arch", "86").stderr
