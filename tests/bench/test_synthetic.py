"""Random models and inputs: finite, with outliers, every part of them seen in the output."""

from __future__ import annotations

import pytest
import torch
from bench_cases import CPU, TINY

from support import relative_error
from tonfa.bench.synthetic import (
    FULL,
    dense_model,
    outlier_channels,
    outlier_input,
    quantized_model,
    step_inputs,
    unfilled_dense_model,
)
from tonfa.bench.variant import CHECK_BOUND
from tonfa.layers.linear import SVDQLinear


def run(model: torch.nn.Module, **arguments: object) -> torch.Tensor:
    with torch.no_grad():
        return model(**step_inputs(TINY, 64, 96, text_tokens=8, **arguments))[0]


@pytest.mark.parametrize("rank", [0, 32])
def test_quantized_model(rank: int) -> None:
    model = quantized_model(TINY, rank, CPU)
    output = run(model, batch=2)
    assert output.shape == (2, 4 * 6, 64) and output.isfinite().all() and 0.1 < output.std() < 10
    assert all(layer.rank == rank for layer in model.modules() if isinstance(layer, SVDQLinear))
    assert torch.equal(output, run(quantized_model(TINY, rank, CPU), batch=2))
    assert not torch.equal(output, run(quantized_model(TINY, rank, CPU, seed=1), batch=2))


@pytest.mark.parametrize("field", ["qweight", "proj_down", "smooth_factor", "bias"])
@pytest.mark.parametrize("layer", ["attn.to_qkv", "attn.to_out", "ff.up", "ff.down"])
def test_a_wrong_tensor_changes_the_step_more_than_the_check_allows(field: str, layer: str) -> None:
    """Or the check of a small model would not see what a kernel left out."""
    model = quantized_model(TINY, 32, CPU).set_activations("none", "reference")
    expected = run(model)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        tensor = getattr(block.get_submodule(layer), field)
        tensor.data = torch.ones_like(tensor) if field == "smooth_factor" else torch.zeros_like(tensor)
    model.set_activations("none", "reference")
    assert relative_error(run(model), expected) > CHECK_BOUND


def test_dense_model_and_its_unfilled_twin() -> None:
    output = run(dense_model(TINY, CPU))
    assert output.isfinite().all() and 0.1 < output.std() < 10
    assert all(p.is_meta for p in unfilled_dense_model(TINY).parameters())


def test_outliers() -> None:
    x = outlier_input(256, 192, torch.Generator().manual_seed(0)).float()
    large = torch.zeros(192, dtype=torch.bool)
    large[outlier_channels(192)] = True
    assert large.sum() == 3
    assert x[:, large].std() == pytest.approx(30, rel=0.1) and x[:, ~large].std() == pytest.approx(1, rel=0.1)


def test_inputs_of_a_control_model() -> None:
    inputs = step_inputs(FULL, 32, 64, batch=2, text_tokens=5)
    assert inputs["hidden_states"].shape == (2, 8, 128) and inputs["encoder_hidden_states"].shape == (2, 5, 4096)
    assert inputs["img_ids"].tolist() == [[0, r, c] for r in range(2) for c in range(4)]
    for name in ("timestep", "guidance"):
        assert torch.equal((inputs[name].bfloat16() * 1000).float(), inputs[name].float() * 1000)
