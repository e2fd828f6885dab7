"""The quantizer's benchmark: every linear of FLUX, stages that add up to the whole, records of the common form."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("quantizer", "error", "synthetic"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import quantizer

    return quantizer


def test_cases_are_the_linears_of_flux(bench: ModuleType) -> None:
    cases = bench.cases(3072, 19, 38)
    shapes = Counter((case.kind, case.n, case.k) for case in cases)
    assert shapes == {
        ("w4a16", 18432, 3072): 38,
        ("w4a16", 9216, 3072): 38,
        ("svdq", 9216, 3072): 76,
        ("svdq", 3072, 3072): 76,
        ("svdq", 12288, 3072): 76,
        ("svdq", 3072, 12288): 76,
    }
    assert all(case.unsigned == (case.k == 12288) for case in cases if case.kind == "svdq")
    assert Counter(case.tokens for case in cases if case.kind == "svdq") == {4096: 76, 512: 76, 4608: 152}
    shared = [case for case in cases if case.sharing]
    assert len(shared) == sum(case.follows for case in cases) == 38
    assert {(case.n, case.sharing) for case in shared} == {(9216, (12288,))}


def test_work_by_hand(bench: ModuleType) -> None:
    case = bench.Case("svdq", 100, 200, False, 10)
    assert bench.work(case, None, 32, 5) == {
        "fp32": pytest.approx((2 * 100 * 200 * 48 * (10 + 8 * 4) + 9 * 2 * 100 * 200 * 32) / 1e12)
    }
    assert bench.work(case, bench.Recipe(), 32, 5)["bf16"] == pytest.approx(2 * 5 * 10 * 200**2 / 1e12)
    follower = bench.Case("svdq", 100, 200, False, 10, follows=True)
    assert bench.work(follower, bench.Recipe(), 32, 5)["bf16"] == 0


@pytest.mark.parametrize("mode", ["--estimate", "--full"])
def test_stages_add_up(
    bench: ModuleType, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "IMAGE_TOKENS", 256)
    monkeypatch.setattr(bench, "TEXT_TOKENS", 128)
    before = bench.calibrated.gptq
    sizes = ["--hidden", "64", "--double-blocks", "0", "--single-blocks", "2", "--rank", "16", "--samples", "2"]
    results = tmp_path / "results.jsonl"
    variants = ["tonfa data-free", "tonfa calibrated for int4"]
    program = ["quantizer.py", mode, *sizes, "--runs", "1", "--variants", *variants, "--results", str(results)]
    monkeypatch.setattr(sys, "argv", program)
    bench.main()
    assert bench.calibrated.gptq is before
    lines = [json.loads(text) for text in results.read_text().splitlines()]
    every = [line for line in lines if "linears" in line["case"]]
    assert [line["variant"] for line in every] == variants
    assert all(("estimated" in line["case"]["linears"]) == (mode == "--estimate") for line in every)
    for line in every:
        parts = {name: part["value"] for name, part in line["parts"].items()}
        assert sum(parts.values()) == pytest.approx(line["value"], rel=1e-3)
        single = [other for other in lines if other["variant"] == line["variant"] and "count" in other["case"]]
        assert sum(other["case"]["count"] for other in single) == 10
        if mode == "--estimate":
            assert sum(o["value"] * o["case"]["count"] for o in single) == pytest.approx(line["value"], rel=1e-3)
    assert {"moments", "smoothing", "hessian", "svd", "scales", "gptq", "refits", "descent"} <= every[1]["parts"].keys()
    errors = dict.fromkeys(variants, 0.0)
    for line in lines:
        errors[line["variant"]] += line["settings"].get("held_out_error", 0)
    assert 0 < errors[variants[1]] < 0.5 * errors[variants[0]]
    assert "all linears" in capsys.readouterr().out


def test_inputs_have_massive_channels_and_differ(bench: ModuleType) -> None:
    data = bench.Synthetic(128, False, 0, torch.device("cpu"))
    x = data.tokens(4096).float()
    power = x.square().mean(dim=0)
    assert power.max() / power.median() > 30  # massive channels
    assert (data.tokens(4096).float() - x).abs().max() > 0
    behind_gelu = bench.Synthetic(128, True, 0, torch.device("cpu")).tokens(4096)
    assert behind_gelu.float().min() >= -0.1720
