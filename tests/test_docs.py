"""What the documents say: the script for any model runs, the method's figures are those of the records."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu-zen4.jsonl"
METHOD = (ROOT / "docs" / "method.md").read_text()
RECIPES, RANKS = METHOD.split("## Error against rank")


def test_script_for_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "any-model.md").read_text(), re.DOTALL | re.MULTILINE
    )
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, "docs/any-model.md", "exec"), names)
    args, kwargs = names["sample"](9)
    with torch.no_grad():
        found, expected = names["same"](*args, **kwargs)[0], names["model"](*args, **kwargs)[0]
    assert torch.equal(found, expected) and expected.std() > 0


def errors(size: int, rank: int, seed: int, kind: str = "geomean") -> dict[tuple[str, str], float]:
    """Of a kind of layers, by default geometric means, by recipe and kind of inputs."""
    case = {"kind": kind, "size": size, "rank": rank, "seed": seed}
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()]
    return {
        (line["variant"], line["case"]["activations"]): line["value"]
        for line in lines
        if line["bench"] == "error" and case.items() <= line["case"].items()
    }


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ("rounding alone", ("rtn", "int4")),
        ("NF4 weights, 16-bit inputs", ("nf4-weight-only", "none")),
        ("INT8 weights and inputs", ("int8-w8a8", "int8")),
        ("`svdquant`, the paper's", ("svdquant", "int4")),
        ("`svdquant-gptq`, as released", ("svdquant-gptq", "int4")),
        ("**`tonfa`**", ("tonfa", "int4")),
        ("**`tonfa`, the same checkpoint**", ("tonfa", "fp8")),
        ("`svdquant` without data", ("svdquant-data-free", "int4")),
        ("**`tonfa` without data**", ("tonfa-data-free", "int4")),
    ],
)
def test_table_of_the_method_is_that_of_the_records(row: str, key: tuple[str, str]) -> None:
    (rest,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", RECIPES, re.MULTILINE)
    _, values, ratios = (re.findall(r"\d[\d.]*", cell) for cell in rest.split("|"))
    for seed in (0, 1):
        found = errors(1536, 32, seed)
        assert math.isclose(float(values[seed]), found[key], abs_tol=6e-4)
        paper = found[key] / found["svdquant", "int4"]
        assert math.isclose(float(ratios[seed if len(ratios) > 1 else 0]), paper, abs_tol=6e-3)
        if len(ratios) == 4:
            without_data = found[key] / found["svdquant-data-free", "int4"]
            assert math.isclose(float(ratios[2 + seed]), without_data, abs_tol=6e-4)


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("inputs", "activations"), [("4 bits", "int4"), ("FP8", "fp8")])
def test_ratios_of_the_rotation_are_those_of_the_records(block: int, inputs: str, activations: str) -> None:
    (rest,) = re.findall(rf"^\| {block}, {inputs} \|(.*)\|$", METHOD, re.MULTILINE)
    cells = [[float(ratio) for ratio in re.findall(r"\d[\d.]*", cell)] for cell in rest.split("|")]
    kinds = ("adaln", "adaln_hard", "gelu", "attn", "gauss", "geomean")
    for kind, ratios in zip(kinds, cells, strict=True):
        for seed, ratio in enumerate(ratios):
            found = errors(768, 32, seed, kind)
            relative = found[f"rotation-{block}", activations] / found["rotation-none", activations]
            assert math.isclose(ratio, relative, abs_tol=6e-4)


OWN_INPUTS = {"float32": "none", "nf4-weight-only": "none", "int8-w8a8": "int8"}


def velocities(model: str, activations: str = "int4") -> dict[str, dict[str, Any]]:
    """The latest records of `recipes.py` by variant, of checkpoints those with these activations."""
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()]
    case = {"kind": "velocity", "model": model, "steps": 8, "samples": 8}
    return {
        line["variant"]: line
        for line in lines
        if {**case, "activations": OWN_INPUTS.get(line["variant"], activations)}.items() <= line["case"].items()
    }


MODELS = ("demo/model", "out/demo-outliers")


@pytest.mark.parametrize(
    ("row", "variant"),
    [
        ("round to nearest, W4A4", "rtn"),
        ("weights alone in NF4", "nf4-weight-only"),
        ("W8A8", "int8-w8a8"),
        ("`svdquant` without data", "svdquant-data-free"),
        ("`tonfa` without data", "tonfa-data-free"),
        ("`svdquant`, calibrated", "svdquant"),
        ("`svdquant-gptq`, calibrated", "svdquant-gptq"),
        ("**`tonfa`, calibrated**", "tonfa"),
    ],
)
def test_velocity_errors_of_the_readme_are_those_of_the_records(row: str, variant: str) -> None:
    (rest,) = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    found = [float(value) for value in re.findall(r"\d[\d.]*", rest)]
    assert found == [round(velocities(model)[variant]["value"], 3) for model in MODELS]


def test_velocity_errors_of_the_evaluation_are_those_of_the_records() -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)`[\w ]* \| (\d[\d.]* \| \d[\d.]*) \|$", text, re.MULTILINE))
    known = [velocities(model) for model in MODELS]
    assert rows.keys() == known[1].keys() <= known[0].keys()
    for variant, values in rows.items():
        assert [float(value) for value in values.split(" | ")] == [round(k[variant]["value"], 4) for k in known]
    ratios = re.findall(r"(\d\.\d+) \[(\d\.\d+), (\d\.\d+)\]", text)
    for ratio, k in zip(ratios, known, strict=True):
        tonfa = k["tonfa"]
        expected = (tonfa["ratios"]["svdquant"], *tonfa["settings"]["ratio_intervals"]["svdquant"])
        assert [float(value) for value in ratio] == [round(value, 3) for value in expected]


def test_velocity_errors_of_the_calibration_are_those_of_the_records() -> None:
    text = (ROOT / "docs" / "calibration.md").read_text()
    rows = re.findall(r"^\| [^|]*\(`([\w-]+)`\) \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 13
    for variant, rest in rows:
        for activations, cell in zip(("int4", "int8", "fp8", "none"), rest.split("|"), strict=True):
            if cell.strip():
                assert float(cell) == round(velocities("demo/model", activations)[variant]["value"], 3)


def test_figure_is_drawn_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "rank_figure", raising=False)
    import rank_figure

    lines = RESULTS.read_text().splitlines()
    curves = {series: rank_figure.points(lines, series, 768, 0) for series in rank_figure.SERIES}
    for series, curve in curves.items():
        assert list(curve) == [16, 32, 64, 128]
        assert all(error == errors(768, rank, 0)[series.variant, series.activations] for rank, error in curve.items())
    assert rank_figure.draw(curves, 768) == (ROOT / "docs" / "error-against-rank.svg").read_text()
    for series, curve in curves.items():
        (rest,) = re.findall(rf"^\| {re.escape(series.label)} \|(.*)\|$", RANKS, re.MULTILINE)
        assert [float(cell) for cell in rest.split("|")] == [round(error, 4) for error in curve.values()]
