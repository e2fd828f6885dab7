"""`tonfa bench`: records of every command on the CPU, field by field, and how it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tonfa.bench.protocol import Timing
from tonfa.cli.bench_options import parse_pair
from tonfa.cli.bench_run import ENOUGH_RUNS
from tonfa.version import __version__

COMMANDS = ("step", "waterfall", "linear", "attention", "image", "error")

FIELDS: dict[str, type | tuple[type, ...]] = {
    "schema": int,
    "bench": str,
    "case": dict,
    "variant": str,
    "settings": dict,
    "unit": str,
    "value": float,
    "min": float,
    "max": float,
    "runs": int,
    "baselines": dict,
    "ratios": dict,
    "memory_gib": dict,
    "floor": dict,
    "parts": dict,
    "device": str,
    "versions": dict,
    "commit": str,
    "date": str,
}


def records(file: Path, bench: str, case: dict[str, Any], baselines: set[str]) -> list[dict[str, Any]]:
    """The records of a file, each checked against the schema of benchmarks/README.md."""
    lines = [json.loads(line, parse_constant=pytest.fail) for line in file.read_text().splitlines()]
    for line in lines:
        assert list(line) == list(FIELDS)
        for name, kind in FIELDS.items():
            assert isinstance(line[name], kind), (name, line[name])
        assert (line["schema"], line["bench"]) == (1, bench)
        assert case.items() <= line["case"].items()
        assert 0 < line["min"] <= line["value"] <= line["max"]
        assert line["runs"] >= ENOUGH_RUNS.get(bench, 1)
        assert set(line["baselines"]) == set(line["ratios"]) == baselines
        for name, value in line["baselines"].items():
            ratio = line["value"] / value if line["unit"] == "relative" else value / line["value"]
            assert line["ratios"][name] == pytest.approx(ratio, abs=1e-3)
        assert all(gib > 0 for gib in line["memory_gib"].values())
        assert line["versions"]["tonfa"] == __version__ and "torch" in line["versions"]
        assert line["commit"] == "" or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", line["commit"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", line["date"])
    return lines


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


STEP = ("step", "--device", "cpu", "--size", "32x48", "--text-tokens", 8)


def test_step(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    result = tonfa(
        "bench", *STEP, "--model", depth_pipeline, "--batch", 1, "--batch", 2, "--rank", 16, "--out", "r.jsonl"
    )
    assert result.exit_code == 0, result.output
    case = {"height": 32, "width": 48, "text_tokens": 8, "hidden": 128, "layers": [1, 1], "in_channels": 128}
    lines = records(tmp_path / "r.jsonl", "step", case, {"bf16-eager", "rank-0"})
    assert [line["case"]["batch"] for line in lines] == [1, 1, 1, 2, 2, 2]
    ours, eager, without = lines[:3]
    assert ours["variant"] == "tonfa int4 weights, int8 activations" and eager["variant"] == "bf16-eager"
    assert ours["settings"] == {
        "weights": "int4",
        "activations": "int8",
        "attention": "sdpa",
        "attention_kernel": "ops.attention.reference",
        "fused": True,
        "graph": False,
        "rank": 16,
        "backend": "cpu",
    }
    assert (eager["ratios"]["bf16-eager"], without["ratios"]["rank-0"]) == (1.0, 1.0)
    assert without["settings"]["rank"] == 0 and without["value"] == ours["baselines"]["rank-0"]
    assert ours["memory_gib"]["weights"] < eager["memory_gib"]["weights"]
    assert re.search(r"^ +\d+\.\d s  checked tonfa", result.stderr, re.MULTILINE)
    assert "tonfa int4 weights, int8 activations" in result.stdout and "x bf16-eager" in result.stdout


def test_waterfall(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    small = ("--model", depth_pipeline, "--size", "32x48", "--text-tokens", 8, "--rank", 16, "--blocks", "1x2")
    result = tonfa("bench", "waterfall", "--device", "cpu", *small, "--out", "r")
    assert result.exit_code == 0, result.output
    lines = records(tmp_path / "r", "waterfall", {"height": 32, "layers": [1, 2]}, {"bf16-eager"})
    found = {line["case"]["bar"]: (line["case"]["technique"], line["settings"].get("fused")) for line in lines}
    assert found == {
        0: ("16-bit weights, eager", None),
        1: ("4-bit weights, INT8 products", False),
        2: ("fused kernels", True),
    }
    (title,) = [line for line in result.stdout.splitlines() if line.startswith("waterfall: ")]
    assert "nothing fused" in result.stdout and "technique" not in title


def test_a_time_limit_takes_the_place_of_runs(tonfa, depth_pipeline: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tonfa.bench.step.interleaved", few_runs)
    small = (*STEP, "--model", depth_pipeline, "--rank", 16, "--baseline", "bf16-eager")
    assert tonfa("bench", *small, "--seconds", 5, "--out", "r").exit_code == 0
    lines = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert [line["runs"] for line in lines] == [7, 7]
    result = tonfa("bench", *small, "--out", "s")
    assert "not recorded, 7 runs are too few" in result.stderr and not (tmp_path / "s").exists()


def few_runs(candidates: dict[str, Any], *_: object, **__: object) -> dict[str, Timing]:
    return {name: Timing(2.0, 1.0, 3.0, 7) for name in candidates}


def test_linear(tonfa, tmp_path: Path) -> None:
    result = tonfa(
        "bench", "linear", "--device", "cpu", "--shape", "128x64", "--rows", 8, "--rows", 16, "--rank", 16, "--out", "r"
    )
    assert result.exit_code == 0, result.output
    lines = records(tmp_path / "r", "linear", {"n": 128, "k": 64, "rank": 16}, {"torch-bf16", "torch-fp32"})
    assert [line["case"]["m"] for line in lines] == [8, 8, 8, 16, 16, 16]
    ours, bf16, fp32 = lines[:3]
    assert ours["settings"] == {"weights": "int4", "activations": "int8", "backend": "cpu"}
    assert ours["baselines"] == {"torch-bf16": bf16["value"], "torch-fp32": fp32["value"]}
    assert fp32["memory_gib"]["weights"] == pytest.approx(128 * 64 * 4 / 2**30, abs=1e-4)


def test_attention(tonfa, tmp_path: Path) -> None:
    names = ("sdpa-default", "sdpa-math")
    arguments = [word for name in names for word in ("--baseline", name)]
    result = tonfa("bench", "attention", "--device", "cpu", "--tokens", 40, "--out", "r", *arguments)
    assert result.exit_code == 0, result.output
    case = {"batch": 1, "heads": 2, "tokens": 40, "head_dim": 128}
    lines = records(tmp_path / "r", "attention", case, set(names))
    assert [line["variant"] for line in lines] == ["tonfa attention", *names]


def test_image(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    small = ("--size", "32x48", "--steps", 1, "--text-tokens", 8, "--runs", 2, "--rank", 16)
    result = tonfa("bench", "image", "--device", "cpu", "--model", depth_pipeline, "--out", "r", *small)
    assert result.exit_code == 0, result.output
    case = {"height": 32, "width": 48, "steps": 1, "control": True, "rank": 16}
    ours, dense = records(tmp_path / "r", "image", case, {"bf16"})
    assert (ours["unit"], ours["runs"], dense["variant"]) == ("s", 2, "bf16")
    assert ours["memory_gib"]["weights"] < dense["memory_gib"]["weights"]


def test_image_of_a_text_model_with_a_checkpoint(tonfa, text_pipeline: Path, tmp_path: Path) -> None:
    quantized = tonfa("quantize", text_pipeline, "--out", "q", "--iterations", 0)
    assert quantized.exit_code == 0, quantized.output
    small = ("--size", "32x32", "--steps", 1, "--text-tokens", 8, "--runs", 1)
    result = tonfa("bench", "image", "--device", "cpu", "--model", text_pipeline, "--transformer", "q", *small)
    assert result.exit_code == 0, result.output
    (file,) = tmp_path.glob("tonfa-bench-cpu-*.jsonl")
    ours, _ = records(file, "image", {"control": False, "rank": 32}, {"bf16"})
    assert ours["settings"] == {"weights": "int4", "activations": "int8"}


def test_error(tonfa, depth_pipeline: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Of a 16-bit pipeline, quantized now, and of a checkpoint; both grow as activations lose bits."""
    for model in (depth_pipeline, checkpoint):
        file = tmp_path / f"{model.name}.jsonl"
        small = ("--size", "32x48", "--text-tokens", 8, "--rank", 32, "--out", file)
        result = tonfa("bench", "error", "--device", "cpu", "--model", model, *small)
        assert result.exit_code == 0, result.output
        case = {"kind": "step", "model": model.name, "size": [32, 48], "rank": 32}
        lines = records(file, "error", case, {"int4"})
        errors = {line["case"]["activations"]: line["value"] for line in lines}
        assert all(line["unit"] == "relative" and line["runs"] == 1 for line in lines)
        assert all(line["settings"]["attention"] == "sdpa" and line["case"]["layers"] == [1, 1] for line in lines)
        # 8-bit integers cost a model this small no more than bf16's own rounding does.
        assert max(errors["none"], errors["int8"]) < errors["fp8"] < errors["int4"] < 0.5
        assert lines[-1]["settings"]["backend"] in ("cpu", "reference")


def test_published_arithmetic_is_measured_unasked(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    small = ("--size", "32x32", "--text-tokens", 8, "--activations", "int8", "--out", "r")
    assert tonfa("bench", "error", "--device", "cpu", "--model", depth_pipeline, *small).exit_code == 0
    assert [line["case"]["activations"] for line in records(tmp_path / "r", "error", {}, {"int4"})] == ["int8", "int4"]


def test_error_of_a_few_blocks(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    small = ("--size", "32x32", "--text-tokens", 8, "--activations", "int8", "--blocks", "1x2")
    assert tonfa("bench", "error", "--device", "cpu", "--model", "demo", *small, "--out", "r").exit_code == 0
    case = {"model": "demo", "layers": [1, 2]}
    ours, published = records(tmp_path / "r", "error", case, {"int4"})
    assert ours["ratios"]["int4"] < 0.5 and published["variant"] == "tonfa int4 weights, int4 activations"
    result = tonfa("bench", "error", "--device", "cpu", "--model", depth_pipeline, *small)
    assert result.exit_code == 1 and "--blocks: a model with its own weights" in result.stderr


def test_records_of_two_runs_stand_in_one_file(tonfa, tmp_path: Path) -> None:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    run = ("bench", "attention", "--device", "cpu", "--tokens", 16, "--baseline", "sdpa-default")
    for _ in range(2):
        assert tonfa(*run).exit_code == 0
    (file,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert len(records(file, "attention", {}, {"sdpa-default"})) == 4


def test_dry_runs_and_short_ones_write_nothing(tonfa, tmp_path: Path) -> None:
    run = ("bench", "attention", "--device", "cpu", "--tokens", 16, "--baseline", "sdpa-default")
    dry = tonfa(*run, "--dry-run")
    short = tonfa(*run, "--runs", 2)
    assert dry.exit_code == short.exit_code == 0
    assert "sdpa-default" in dry.stdout and "sdpa-default" in short.stdout
    assert "not recorded, 2 runs are too few" in short.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_description_and_an_example(tonfa, name: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", tonfa("bench", name, "--help").stdout)
    assert re.search(rf"Example:\s+tonfa bench {name}", text)
    assert all(option in text for option in ("--out", "--dry-run", "--device", "--debug"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", "--baseline", "nonsense"), "'nonsense' is none of bf16-eager, bf16-compiled"),
        (("linear", "--baseline", "bf16-eager"), "'bf16-eager' is none of torch-bf16"),
        (("attention", "--baseline", "flash"), "'flash' is none of sdpa-default"),
        (("step", "--size", "1000x1024"), "'1000x1024' is no pair of positive multiples of 16"),
        (("step", "--size", "1024"), "'1024' is no pair"),
        (("image", "--size", "0x16"), "'0x16' is no pair"),
        (("error", "--size", "-16x16"), "'-16x16' is no pair"),
        (("linear", "--shape", "100x64"), "'100x64' is no pair of positive multiples of 64"),
        (("step", "--weights", "int2"), "'int2' is none of int4, fp8"),
        (("error", "--activations", "int2"), "'int2' is none of int4, int8, fp8, none"),
        (("linear", "--rank", "-1"), "greater than or equal to 0"),
        (("step", "--blocks", "3"), "'3' is no pair of positive multiples of 1"),
        (("waterfall", "--blocks", "0x4"), "'0x4' is no pair"),
        (("step", "--seconds", "1"), "greater than or equal to 5"),
        (("step", "--attention", "fast"), "'fast' is not one of"),
    ],
)
def test_wrong_usage_is_2(tonfa, arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = tonfa("bench", arguments[0], "--device", "cpu", *arguments[1:])
    assert result.exit_code == 2 and message in result.stderr and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("step", "--device", "cuda:99"), "--device cuda:99"),
        (("step", "--device", "cpu", "--weights", "fp8"), "weights='fp8': the cpu backend"),
        (("step", "--device", "cpu", "--model", "nowhere"), "--model nowhere"),
        (("step", "--device", "cpu", "--attention", "fp8"), "attention='fp8' does not run on cpu"),
        (("error", "--device", "cpu", "--attention", "fp8", "--blocks", "1x1"), "attention='fp8' does not run on cpu"),
        (("image", "--device", "cpu", "--model", "nowhere"), "--model nowhere: no folder of a Diffusers pipeline"),
        (("error", "--device", "cpu", "--model", "."), "--model ."),
        (("linear", "--device", "cpu", "--baseline", "scaled-mm-fp8"), "multiplies no FP8"),
        (("linear", "--device", "cpu", "--baseline", "cublas-bf16"), "needs a GPU"),
        (("attention", "--device", "cpu", "--tokens", "16", "--baseline", "sdpa-cudnn"), "sdpa-cudnn does not run on"),
        (("linear", "--device", "cpu", "--out", "."), "--out: . is a folder"),
        (("linear", "--device", "cpu", "--out", "file/r.jsonl"), "--out: file/r.jsonl cannot be written"),
    ],
)
def test_what_cannot_be_done_is_one_line(tonfa, arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = tonfa("bench", *arguments)
    assert result.exit_code == 1, result.output
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_torchao_that_is_missing_fails_only_if_it_was_named(
    tonfa, depth_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tonfa.bench.dense.find_spec", lambda _: None)
    run = (*STEP, "--model", depth_pipeline, "--dry-run", "--runs", 1, "--rank", 16)
    named = tonfa("bench", *run, "--baseline", "torchao-fp8-compiled")
    assert named.exit_code == 1
    assert named.stderr.splitlines()[-1] == (
        "error: baseline torchao-fp8-compiled: torchao is not installed (pip install torchao)"
    )
    monkeypatch.setattr("tonfa.bench.dense.EAGER", "torchao-fp8-compiled")  # among the defaults, as on a GPU
    unnamed = tonfa("bench", *run)
    assert unnamed.exit_code == 0, unnamed.output
    assert "skipped baseline torchao-fp8-compiled: torchao is not installed" in unnamed.stderr


def test_a_4_bit_pipeline_has_nothing_to_compare_with(tonfa, depth_pipeline: Path, checkpoint: Path) -> None:
    folder = Path("pipeline")
    folder.mkdir()
    (folder / "model_index.json").write_text((depth_pipeline / "model_index.json").read_text())
    (folder / "transformer").symlink_to(checkpoint)
    result = tonfa("bench", "image", "--device", "cpu", "--model", folder)
    assert result.exit_code == 1 and "its transformer is 4-bit" in result.stderr


def test_pairs() -> None:
    assert parse_pair("1024x768", "--size", 16) == (1024, 768)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", ["--graph", "--no-graph"])
def test_step_on_a_gpu(tonfa, graph: str, tmp_path: Path) -> None:
    arguments = ("--model", "demo", "--size", "256x256", "--baseline", "bf16-eager", "--baseline", "rank-0")
    result = tonfa("bench", "step", "--device", "cuda", *arguments, graph, "--out", "r")
    assert result.exit_code == 0, result.output
    ours, eager, _ = records(tmp_path / "r", "step", {"hidden": 256}, {"bf16-eager", "rank-0"})
    assert ours["settings"]["graph"] is (graph == "--graph")
    memory = ours["memory_gib"]
    assert 0 < memory["weights"] < memory["peak"] and ("peak_graph" in memory) is (graph == "--graph")
    assert eager["memory_gib"]["weights"] > memory["weights"]
    parts = ours["parts"]
    assert parts["products"]["value"] > 0 and parts["attention"]["value"] > 0
    assert ours["floor"]["value"] == pytest.approx(sum(part["floor"] for part in parts.values()), abs=1e-2)
    assert all(part["floor"] >= 0 and part["why"] for part in parts.values())
    assert eager["parts"] == {} == eager["floor"]


@pytest.mark.gpu
def test_linear_and_attention_on_a_gpu(tonfa, tmp_path: Path) -> None:
    shape = ("--shape", "512x512", "--rows", 256, "--baseline", "cublas-bf16", "--out", "linear")
    assert tonfa("bench", "linear", "--device", "cuda", *shape).exit_code == 0
    assert len(records(tmp_path / "linear", "linear", {"m": 256}, {"cublas-bf16"})) == 2
    shape = ("--tokens", 256, "--heads", 2, "--baseline", "sdpa-default", "--out", "attention")
    assert tonfa("bench", "attention", "--device", "cuda", *shape).exit_code == 0
    assert len(records(tmp_path / "attention", "attention", {"tokens": 256}, {"sdpa-default"})) == 2
