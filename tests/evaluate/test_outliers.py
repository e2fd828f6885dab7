"""Transplanted outliers: the model's output stays, the linears' inputs get channels that are massive."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from support import relative_error
from tonfa.bench.synthetic import step_inputs
from tonfa.errors import UnsupportedError
from tonfa.evaluate.layers import LayerInputs
from tonfa.evaluate.outliers import Outliers, kurtosis, peak_to_median, transplant_outliers
from tonfa.models.flux.plan import flux_dims, flux_plan

CONFIG = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
}


def model(dtype: torch.dtype) -> Any:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(**CONFIG).to(dtype).eval()


def inputs_of(transformer: Any, step: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs of every planned linear, and the velocity."""
    collected = LayerInputs(flux_plan(flux_dims(dict(transformer.config))), calls=1)
    with torch.no_grad(), collected.kept(transformer):
        velocity = transformer(**step)[0]
    return {name: torch.cat(rows) for name, rows in collected.rows.items()}, velocity


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_the_function_stays(dtype: torch.dtype, bound: float) -> None:
    step = step_inputs(CONFIG, 64, 96, text_tokens=16, dtype=dtype)
    original = model(dtype)
    before, expected = inputs_of(original, step)
    changed = transplant_outliers(model(dtype))
    after, found = inputs_of(changed, step)
    assert relative_error(found, expected) < bound
    for name, x in after.items():
        untouched = name.endswith((".down", "norm.linear", "norm1.linear", "norm1_context.linear"))
        if untouched:
            assert relative_error(x, before[name]) < max(bound, 1e-4), name
        elif name.endswith(("to_out", "to_add_out")):  # no massive channels, but of different sizes
            assert peak_to_median(x) > 1.5 * peak_to_median(before[name]), name
        else:
            assert peak_to_median(before[name]) < 4 < 6 < peak_to_median(x), name
            assert kurtosis(x) > 3 * kurtosis(before[name]), name


def test_massive_channels_are_massive_at_every_token() -> None:
    step = step_inputs(CONFIG, 64, 96, text_tokens=16, dtype=torch.float32)
    x = inputs_of(transplant_outliers(model(torch.float32)), step)[0]["transformer_blocks.0.attn.to_qkv"]
    sizes = x.abs().median(dim=0).values
    assert len(sizes) // 64 == 2 and (sizes.topk(2).values > 5 * sizes.median()).all()
    assert (x.std(dim=0)[sizes.topk(2).indices] < sizes.topk(2).values).all()


def test_equal_seeds_are_equal_and_others_are_not() -> None:
    states = [transplant_outliers(model(torch.float32), Outliers(seed=s)).state_dict() for s in (3, 3, 4)]
    name = "transformer_blocks.0.attn.to_q.weight"
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    assert not torch.equal(states[0][name], states[2][name])
    outer = [n for n in states[0] if "blocks" not in n]
    assert outer and all(torch.equal(states[0][n], model(torch.float32).state_dict()[n]) for n in outer)


def test_nothing_is_drawn_from_nothing() -> None:
    none = Outliers(spread=0, massive=0)
    state, expected = transplant_outliers(model(torch.float32), none).state_dict(), model(torch.float32).state_dict()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("wrong", [{"spread": -1}, {"massive": 1}, {"least": 0.5}, {"most": 4}, {"constant": 1}])
def test_senseless_distributions(wrong: dict[str, float]) -> None:
    with pytest.raises(UnsupportedError, match="no distribution of outliers"):
        Outliers(**wrong)  # type: ignore[arg-type]


def test_statistics_of_known_numbers() -> None:
    x = torch.tensor([[1.0, -2.0, 30.0], [-1.5, 1.0, 0.0]])
    assert peak_to_median(x) == pytest.approx(15)
    normal = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(0))
    assert kurtosis(normal) == pytest.approx(3, abs=0.05)
    assert kurtosis(torch.tensor([[-1.0], [1.0]])) == 1
