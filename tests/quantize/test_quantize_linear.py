"""A dense linear as SVDQWeights: the error falls with rank and alternation, the bias comes back, bad input is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import DEVICES, relative_error
from tonfa.errors import FormatError, UnsupportedError
from tonfa.formats import GELU_SHIFT, INT4
from tonfa.quantizer.recipe import Recipe, quantize_linear
from tonfa.weights import SVDQWeights


def structured(n: int = 256, k: int = 256) -> Tensor:
    """Gaussian weights with a few strong directions and rows of different size."""
    return 0.02 * (torch.randn(n, k) + torch.randn(n, 8) @ torch.randn(8, k)) * torch.rand(n, 1).add(0.5)


def error(weight: Tensor, recipe: Recipe) -> float:
    return relative_error(quantize_linear(weight, None, recipe).dense()[0], weight)


def test_error_falls_with_the_rank() -> None:
    weight = structured()
    errors = [error(weight, Recipe(rank, iterations=0)) for rank in (16, 32, 64, 128, 256)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.5 * relative_error(INT4.dequantize(*INT4.quantize(weight)), weight)


def test_error_falls_with_alternations() -> None:
    weight = structured()
    errors = [error(weight, Recipe(16, iterations)) for iterations in (0, 1, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.93 * errors[0]


def test_full_rank_is_exact_up_to_the_dtype() -> None:
    weight = structured(128, 128)
    assert error(weight, Recipe(128, iterations=0)) < 1e-6
    assert error(weight.bfloat16(), Recipe(128, iterations=0)) < 1e-3


def test_gain_over_the_published_recipe_on_gaussian_weights() -> None:
    """The figures of the module's docstring, at a size where the decomposition is randomized."""
    weight = torch.randn(768, 768)
    assert error(weight.bfloat16(), Recipe(32, iterations=0)) == pytest.approx(0.0843, abs=1e-3)
    assert error(weight.bfloat16(), Recipe(32, iterations=8)) == pytest.approx(0.0720, abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("unsigned", [False, True])
def test_shapes_dtypes_and_bias(device: str, dtype: torch.dtype, unsigned: bool) -> None:
    weight, bias = structured(192, 128).to(device, dtype), torch.randn(192).to(device, dtype)
    found = quantize_linear(weight, bias, Recipe(16, iterations=1), unsigned=unsigned)
    found.check()
    assert (found.wscales.dtype, found.wscales.device, found.unsigned) == (dtype, weight.device, unsigned)
    assert (found.out_features, found.in_features, found.rank) == (192, 128, 16)
    assert torch.equal(found.smooth_factor, torch.ones_like(found.smooth_factor))
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    for restored in (found.dense()[1], found.unshifted().bias.float()):
        assert torch.allclose(restored, bias.float(), rtol=tolerance, atol=tolerance)
    correction = GELU_SHIFT * found.residual().sum(dim=1) if unsigned else torch.zeros_like(bias.float())
    assert torch.equal(found.bias, (bias.float() - correction).to(dtype))


def test_no_bias_is_a_zero_bias() -> None:
    assert not quantize_linear(structured(), None, Recipe(16, 0)).bias.any()


def test_storage_dtype_may_differ_from_the_source() -> None:
    weight = structured()
    found = quantize_linear(weight, torch.zeros(256), Recipe(16, 0), dtype=torch.bfloat16)
    found.check()
    assert found.wscales.dtype == torch.bfloat16
    assert relative_error(found.dense()[0], weight) == pytest.approx(error(weight.bfloat16(), Recipe(16, 0)), rel=0.02)


def test_zero_weight_is_exact() -> None:
    assert not quantize_linear(torch.zeros(128, 128), None, Recipe(16, 2)).dense()[0].any()


def test_deterministic_and_the_source_is_left_alone() -> None:
    weight, bias = torch.randn(576, 640).bfloat16(), torch.randn(576).bfloat16()
    copies = weight.clone(), bias.clone()
    first, again = (quantize_linear(weight, bias, Recipe(16, 2), unsigned=True) for _ in range(2))
    for field in dataclasses.fields(SVDQWeights):
        if field.name != "unsigned":
            assert torch.equal(getattr(first, field.name), getattr(again, field.name)), field.name
    assert torch.equal(weight, copies[0])
    assert torch.equal(bias, copies[1])


@settings(max_examples=15)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31), st.booleans())
def test_any_shape_of_whole_groups(rows: int, groups: int, seed: int, unsigned: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(16 * rows + 3, 64 * groups, generator=generator)
    found = quantize_linear(weight, None, Recipe(16, 1), unsigned=unsigned)
    found.check()
    assert relative_error(found.dense()[0], weight) < 0.1
    assert found.dense()[1].abs().max() < 1e-5


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.zeros(64, 100), None, r"block\.7\.weight: K = 100 .* group size 64"),
        (torch.zeros(16, 64), None, r"block\.7\.weight: rank 32 exceeds the smaller side of 16 x 64"),
        (torch.full((64, 64), torch.nan), None, r"block\.7\.weight: holds NaN"),
        (torch.full((64, 64), -torch.inf), None, r"block\.7\.weight: holds NaN"),
        (torch.zeros(64, 64), torch.full((64,), torch.inf), r"block\.7\.bias: holds NaN"),
        (torch.zeros(64, 64), torch.zeros(63), r"block\.7\.bias: expected floats of shape \(64,\)"),
        (torch.zeros(64, 64), torch.zeros(64, dtype=torch.int8), r"block\.7\.bias: .*int8"),
        (torch.zeros(64, 64, dtype=torch.int8), None, r"block\.7\.weight: .*int8"),
        (torch.zeros(64), None, r"block\.7\.weight: expected a float matrix"),
        (torch.zeros(0, 64), None, r"block\.7\.weight: expected a float matrix"),
    ],
)
def test_bad_weights_are_named(weight: Tensor, bias: Tensor | None, message: str) -> None:
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    with pytest.raises(FormatError, match=message):
        quantize_linear(weight, bias, Recipe(32), dtype=dtype, name="block.7")


def test_values_beyond_the_storage_dtype_are_named() -> None:
    with pytest.raises(FormatError, match=r"linear\.weight: .* beyond float16"):
        quantize_linear(torch.full((64, 64), 1e5), None, Recipe(16), dtype=torch.float16)
    with pytest.raises(FormatError, match=r"linear\.weight: values are too large"):
        quantize_linear(1e30 * torch.randn(64, 64), None, Recipe(16, 0))
    with pytest.raises(FormatError, match="cannot store scales as torch.int8"):
        quantize_linear(torch.ones(64, 64), None, Recipe(16), dtype=torch.int8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank must be an integer of at least 16, got 0"),
        ({"rank": -16}, "rank must be an integer"),
        ({"rank": 24}, "rank must be a multiple of 16 for the kernels, got 24"),
        ({"rank": 32.0}, "rank must be an integer"),
        ({"rank": True}, "rank must be an integer"),
        ({"iterations": -1}, "iterations must be an integer of at least 0, got -1"),
        ({"seed": "x"}, "seed must be an integer"),
    ],
)
def test_bad_recipes_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Recipe(**settings)


def test_recipes_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().rank = 64
