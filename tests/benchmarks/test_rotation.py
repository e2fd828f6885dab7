"""The rotation that benchmarks/rotation.py measures: exact where nothing is rounded, and of use where it should be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rotation
from rotation import NONE, Problem, Variant, hadamard, held_out_error, rotated
from synthetic import make_layer


@pytest.mark.parametrize("size", [64, 128])
def test_hadamard_matrices_are_orthonormal_and_even(size: int) -> None:
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size))
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5))


def test_blocks_are_rotated_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(3, 256, generator=generator), torch.randn(5, 256, generator=generator)
    matrix = hadamard(64)
    exact = torch.block_diag(*[matrix] * 4)
    torch.testing.assert_close(rotated(x, matrix), x @ exact)
    torch.testing.assert_close(rotated(x, matrix) @ rotated(w, matrix).T, x @ w.T, atol=1e-4, rtol=1e-4)


def test_layers_with_massive_channels_gain_and_gaussian_ones_do_not() -> None:
    device = torch.device("cpu")
    problems = {kind: Problem.of(make_layer(kind, 256, 0), 0, device) for kind in ("adaln", "gelu", "gauss")}

    def ratio(kind: str) -> float:
        plain, turned = (held_out_error(problems[kind], v, 32, "int4") for v in (NONE, Variant(64)))
        return turned / plain

    assert ratio("adaln") < 0.95
    assert 0.97 < ratio("gauss") < 1.03
    # The sign costs more than the rotation gains; a mean error left out of the bias would cost several times that.
    assert 1.0 < ratio("gelu") < 1.2


def test_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.jsonl"
    monkeypatch.setattr(rotation, "VARIANTS", (NONE, Variant(64)))
    arguments = ["rotation.py", "--size", "128", "--rank", "16", "--kinds", "gauss", "--results", str(path)]
    monkeypatch.setattr("sys.argv", arguments)
    rotation.main()
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(line["variant"], line["case"]["activations"]) for line in lines] == [
        (name, activations) for activations in ("int4", "fp8") for name in ("rotation-none", "rotation-64")
    ]
    for line in lines:
        relative = line["value"] / line["baselines"]["rotation-none"]
        assert line["unit"] == "relative error"
        assert line["ratios"]["rotation-none"] == pytest.approx(relative, abs=1e-4)
