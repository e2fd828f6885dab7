"""The brackets that recipes are measured between, and the script that measures them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import outliers
import recipes
from brackets import NF4, RoundedLinear, apply_bracket, nf4, rounded_weight
from support import relative_error
from tiny_models import save_tiny_pipeline
from tonfa.formats import GELU_SHIFT


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline(tmp_path_factory.mktemp("recipes") / "pipeline")


def transformer(pipeline: Path) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(pipeline / "transformer", dtype=torch.bfloat16)


def test_rounded_weights() -> None:
    levels = torch.tensor(NF4).repeat(4)[None]
    assert torch.equal(nf4(3 * levels), 3 * levels) and torch.equal(nf4(torch.zeros(2, 64)), torch.zeros(2, 64))
    row = torch.linspace(-1, 1, 64)[None]
    assert (nf4(row) - row).abs().max() <= max(b - a for a, b in pairwise(NF4)) / 2 + 1e-6
    assert (rounded_weight("rtn", row, "int4") - row).abs().max() <= 0.5 / 7 + 1e-3
    assert (rounded_weight("int8-w8a8", row, "int4") - row).abs().max() <= 0.5 / 127 + 1e-6


def test_every_linear_of_the_blocks_is_rounded(pipeline: Path) -> None:
    for name, modulations in (("rtn", False), ("nf4-weight-only", True), ("int8-w8a8", True)):
        dense, rounded = transformer(pipeline), apply_bracket(name, transformer(pipeline), "int4")
        replaced = {n for n, m in rounded.named_modules() if isinstance(m, RoundedLinear)}
        linears = {n for n, m in dense.named_modules() if isinstance(m, torch.nn.Linear) and "blocks." in n}
        assert replaced == {n for n in linears if modulations or "norm" not in n}
        for linear in linears:
            weight = dense.get_submodule(linear).weight
            error = relative_error(rounded.get_submodule(linear).weight.detach(), weight.detach())
            assert 0.001 < error < 0.02 if name == "int8-w8a8" else 0.05 < error < 0.15, linear


def test_the_two_inputs_of_a_single_block_s_output_are_rounded_apart(pipeline: Path) -> None:
    dense = transformer(pipeline).single_transformer_blocks[0].proj_out
    rounded = apply_bracket("rtn", transformer(pipeline), "int4").single_transformer_blocks[0].proj_out
    # Numbers that INT4 holds exactly for attention, and UINT4 after the shift for the MLP.
    attention = torch.tensor([-7.0, 7.0, 3.0, 0.0]).repeat(32).expand(2, -1)
    mlp = (torch.tensor([0.0, 15.0, 4.0, 9.0]) / 4 - GELU_SHIFT).repeat(128).expand(2, -1)
    x = torch.cat([attention, mlp], dim=1).bfloat16()
    expected = x.float() @ rounded.weight.T + dense.bias.float()
    assert relative_error(rounded(x).detach(), expected.detach()) < 0.01
    assert rounded.spans == [(0, 128, False), (128, 640, True)]
    signed = RoundedLinear("rtn", dense, [(0, 640, False)], "int4")
    assert relative_error(signed(x).detach(), expected.detach()) > 0.02


def test_records(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from typer.testing import CliRunner

    from tonfa.cli.app import app

    made = CliRunner().invoke(app, ["quantize", str(pipeline), "--out", str(tmp_path / "int4"), "--iterations", "0"])
    assert made.exit_code == 0, made.output
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": "a", "control_image": "d.png"}]))
    from PIL import Image

    Image.linear_gradient("L").resize((32, 32)).save(tmp_path / "d.png")
    arguments = f"recipes.py --model {pipeline} --prompts {tmp_path / 'prompts.json'} --steps 2 --size 32 --samples 2"
    arguments += f" --text-tokens 16 --candidate svdquant={tmp_path / 'int4'} --results {tmp_path / 'r.jsonl'}"
    monkeypatch.setattr("sys.argv", arguments.split())
    recipes.main()
    records = {line["variant"]: line for line in map(json.loads, (tmp_path / "r.jsonl").read_text().splitlines())}
    assert list(records) == [
        "float32", "rtn", "nf4-weight-only", "int8-w8a8", "svdquant-data-free", "tonfa-data-free", "svdquant",
    ]  # fmt: skip
    values = {name: line["value"] for name, line in records.items()}
    assert 0 < values["float32"] < 0.1  # bf16 rounds timesteps, which random embeddings are sensitive to
    assert 0 < values["int8-w8a8"] < values["tonfa-data-free"] < values["rtn"] < 1
    for line in records.values():
        assert (line["bench"], line["unit"], line["case"]["samples"]) == ("error", "relative error", 2)
        low, high = line["settings"]["ratio_intervals"]["rtn"]
        assert 0.9 * low < line["ratios"]["rtn"] < 1.1 * high
        assert line["ratios"]["rtn"] == pytest.approx(line["value"] / values["rtn"], abs=1e-3)
    assert records["rtn"]["case"]["activations"] == "int4" and records["int8-w8a8"]["case"]["activations"] == "int8"
    assert "/ svdquant" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*arguments.split(), "--candidate", "gone"])
    with pytest.raises(SystemExit):
        recipes.main()
    assert "expected NAME=FOLDER" in capsys.readouterr().err


def test_a_pipeline_with_outliers(pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from diffusers import FluxControlPipeline

    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["outliers.py", "--model", str(pipeline), "--out", str(out)])
    outliers.main()
    assert capsys.readouterr().out.endswith(f"{out}\n")
    FluxControlPipeline.from_pretrained(out, dtype=torch.bfloat16)
    kind = "attention and MLP inputs"
    before, after = (outliers.describe(transformer(folder))[kind] for folder in (pipeline, out))
    assert before[0] < 4 and after[0] > 8 and after[2] > 5 * before[2]
