"""Calibrated recipes: SVDQuant as its paper writes it, tonfa's better on held-out tokens, bad input named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from support import DEVICES, relative_error
from tonfa.errors import FormatError, UnsupportedError
from tonfa.formats import GELU_SHIFT, INT4
from tonfa.ops import product, quantize
from tonfa.ops.activation import InputWeights
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.recipe import RECIPES, Recipe, find_smoothing, named_recipe, quantize_linear
from tonfa.quantizer.smoothing import candidates
from tonfa.weights import SVDQWeights

K, N, RANK = 256, 192, 16


def inputs(tokens: int, seed: int, unsigned: bool = False) -> Tensor:
    """Correlated, with three massive channels; behind a GELU if unsigned."""
    fixed = torch.Generator().manual_seed(0)
    mixing = torch.randn(K, K, generator=fixed) / torch.arange(1, K + 1).sqrt().unsqueeze(1)
    scales = (0.5 * torch.randn(K, generator=fixed)).exp()
    scales[[3, 70, 200]] *= 15
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(seed)) @ mixing
    return ((functional.gelu(x) if unsigned else x) * scales).bfloat16()


def dense() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    return torch.randn(N, K, generator=g) + torch.randn(N, 8, generator=g) @ torch.randn(
        8, K, generator=g
    ), torch.randn(N, generator=g)


def moments_of(unsigned: bool = False, tokens: int = 2048) -> InputMoments:
    moments = InputMoments.empty("block.4", K, kept=2048)
    moments.add(inputs(tokens, 1, unsigned))
    return moments


def held_out(weights: SVDQWeights, activations: str, unsigned: bool = False) -> float:
    weight, bias = dense()
    x = inputs(1024, 2, unsigned)
    read = weights if activations == "int4" else weights.unshifted()
    q = quantize.reference(x, InputWeights(read.smooth_factor, read.proj_down, read.unsigned, activations))
    return relative_error(product.reference(q, read, activations).float() - bias, x.float() @ weight.T)


def made(name: str, unsigned: bool = False, dtype: torch.dtype = torch.bfloat16, **changes: object) -> SVDQWeights:
    weight, bias = dense()
    recipe = dataclasses.replace(named_recipe(name, RANK), **changes)
    return quantize_linear(weight, bias, recipe, moments=moments_of(unsigned), unsigned=unsigned, dtype=dtype)


def test_svdquant_is_the_paper_written_out() -> None:
    """Grid, one-shot decomposition in float64, absmax / 7, nearest: in float32 storage, where nothing is rounded."""
    weight, bias = dense()
    x = inputs(2048, 1).float()
    exact, best = x @ weight.T, None
    for alpha, beta in candidates():
        lam = x.abs().amax(0) ** alpha / weight.abs().amax(0) ** beta
        u, s, v = torch.linalg.svd((weight * lam).double(), full_matrices=False)
        low_rank = ((u[:, :RANK] * s[:RANK]) @ v[:RANK]).float()
        groups = (weight * lam - low_rank).unflatten(1, (-1, 64))
        scales = groups.abs().amax(dim=2) / 7
        codes = (groups / scales.unsqueeze(2)).round().clamp(-7, 7)
        values = (x / lam).bfloat16().float().unflatten(1, (-1, 64))
        unit = values.abs().amax(dim=2, keepdim=True) / 7
        q = ((values / unit).round() * unit.bfloat16().float()).flatten(1)
        rounded = (codes * scales.unsqueeze(2)).flatten(1)
        error = float((q @ rounded.T + (x / lam) @ low_rank.T - exact).square().sum())
        if best is None or error <= best[0]:
            best = error, lam, low_rank, codes.flatten(1), scales
    found = made("svdquant", dtype=torch.float32)
    _, lam, low_rank, codes, scales = best
    assert torch.allclose(found.smooth_factor, lam, rtol=1e-6)
    assert relative_error(found.proj_up @ (found.proj_down * lam.unsqueeze(1)).T, low_rank) < 1e-5
    assert torch.allclose(found.wscales.T, scales, rtol=1e-3)
    assert (found.codes() != codes).float().mean() < 1e-3
    assert torch.equal(found.bias, bias)
    assert found.codes().min() == -7


def test_released_settings_are_better_than_one_shot_and_keep_to_seven() -> None:
    once, alternated, gptq = made("svdquant"), made("svdquant", iterations=100), made("svdquant-gptq")
    assert torch.equal(once.smooth_factor, alternated.smooth_factor)
    errors = [held_out(w, "int4") for w in (once, alternated, gptq)]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.92 * errors[0]
    for weights in (once, alternated, gptq):
        assert int(weights.codes().min()) == -7


@pytest.mark.parametrize("unsigned", [False, True])
def test_tonfa_beats_svdquant_on_held_out_tokens(unsigned: bool) -> None:
    paper, best, ours = (made(name, unsigned) for name in ("svdquant", "svdquant-gptq", "tonfa"))
    for activations, ratio in (("int4", 0.85), ("fp8", 0.65), ("int8", 0.65)):
        error = held_out(ours, activations, unsigned)
        assert error < ratio * held_out(paper, activations, unsigned)
        assert error < 0.97 * held_out(best, activations, unsigned)
    ours.check()
    assert int(ours.codes().min()) == -8


def test_the_plain_weight_is_the_target() -> None:
    """No shrinkage towards zero: output and exact output regress on each other with slope one."""
    weight, _ = dense()
    x = inputs(4096, 3).double()
    exact = x @ weight.double().T
    found = x @ made("tonfa").dense()[0].double().T
    assert float((exact * found).sum() / exact.square().sum()) == pytest.approx(1, abs=2e-3)


def test_bias_of_an_unsigned_layer_takes_up_the_mean_error() -> None:
    ours = made("tonfa", unsigned=True, dtype=torch.float32)
    weight, bias = dense()
    restored, shifted = ours.dense()
    mean = moments_of(unsigned=True).mean()
    assert torch.allclose(restored @ mean + shifted, weight @ mean + bias, atol=1e-3)
    assert not torch.allclose(shifted, bias, atol=1e-3)
    signed = made("tonfa", dtype=torch.float32)
    assert torch.equal(signed.bias, bias)


def test_smoothing_is_an_equivalent_transform() -> None:
    """Whatever the factors, branch and 4-bit part together stand for the same weight."""
    weight, bias = dense()
    factors = (torch.randn(K).abs() + 0.1).bfloat16()
    found = quantize_linear(weight, bias, Recipe(RANK), smooth_factor=factors, dtype=torch.bfloat16)
    assert torch.equal(found.smooth_factor, factors)
    error = (found.dense()[0] - weight) * factors.float()
    assert relative_error(weight * factors.float() + error, weight * factors.float()) < 0.1
    x = inputs(64, 5)
    read = InputWeights(found.smooth_factor, found.proj_down, False, "none")
    y = product.reference(quantize.reference(x, read), found, "none").float()
    assert relative_error(y, x.float() @ found.dense()[0].T + bias) < 0.01


def test_linears_with_one_input_share_factors() -> None:
    weight, _ = dense()
    moments = moments_of()
    for name in ("svdquant", "tonfa"):
        shared = find_smoothing([weight[:64], weight[64:]], moments, named_recipe(name, RANK))
        if name == "tonfa":
            assert not torch.equal(shared, find_smoothing([weight[:64]], moments, named_recipe(name, RANK)))
        found = quantize_linear(
            weight[64:], None, named_recipe(name, RANK), moments=moments, smooth_factor=shared, dtype=torch.bfloat16
        )
        assert torch.equal(found.smooth_factor, shared)


@pytest.mark.parametrize("name", list(RECIPES))
def test_deterministic(name: str) -> None:
    first, again = made(name), made(name)
    for field, tensor in first.tensors().items():
        assert torch.equal(tensor, again.tensors()[field]), field


@pytest.mark.parametrize("device", DEVICES)
def test_zero_weights_and_dead_channels(device: str) -> None:
    x = inputs(512, 1)
    x[:, 64:128] = 0
    moments = InputMoments.empty("block.4", K, device=device)
    moments.add(x.to(device))
    weight = dense()[0].to(device)
    for name in RECIPES:
        zero = quantize_linear(torch.zeros_like(weight), None, named_recipe(name, RANK), moments=moments)
        assert not zero.dense()[0].any()
        found = quantize_linear(weight, None, named_recipe(name, RANK), moments=moments)
        assert torch.isfinite(found.dense()[0]).all()
        assert relative_error(x.float() @ found.dense()[0].cpu().T, x.float() @ weight.cpu().T) < 0.1


def test_columns_without_data() -> None:
    weight = dense()[0] / torch.rand(K).add(0.1)
    columns = weight.square().mean(dim=0).sqrt()
    found = quantize_linear(weight, None, Recipe(RANK, column_power=0.5))
    assert torch.allclose(found.smooth_factor, columns**-0.5, rtol=1e-5)
    assert relative_error(found.dense()[0], weight) < 0.1


def test_svdquant_without_data_is_one_shot_and_absmax() -> None:
    weight, _ = dense()
    found = quantize_linear(weight, None, named_recipe("svdquant", RANK))
    u, s, v = torch.linalg.svd(weight)
    rounded = INT4.dequantize(*INT4.quantize(weight - (u[:, :RANK] * s[:RANK]) @ v[:RANK]))
    assert relative_error(found.residual(), rounded) < 1e-2


def test_bad_calibration_is_named() -> None:
    weight, bias = dense()
    moments = moments_of(tokens=16)
    moments.add(torch.full((1, K), torch.nan).bfloat16())
    with pytest.raises(FormatError, match=r"block\.4: 256 channels of its calibration inputs hold NaN or Inf"):
        quantize_linear(weight, bias, Recipe(RANK), moments=moments)
    with pytest.raises(FormatError, match=r"block\.4: has 128 input channels"):
        quantize_linear(weight[:, :128], bias, Recipe(RANK), moments=moments)
    with pytest.raises(FormatError, match=r"block\.4: no calibration input"):
        quantize_linear(weight, bias, Recipe(RANK), moments=InputMoments.empty("block.4", K))
    for factors in (torch.ones(K - 1), torch.zeros(K), torch.full((K,), torch.nan)):
        with pytest.raises(FormatError, match=r"linear\.smooth_factor: expected 256 positive numbers"):
            quantize_linear(weight, bias, Recipe(RANK), smooth_factor=factors)
    with pytest.raises(FormatError, match="rank 208 exceeds the smaller side of 192 x 256"):
        quantize_linear(weight, bias, Recipe(208), moments=moments_of())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "awq"}, "method 'awq' is unknown; choose one of tonfa, svdquant"),
        ({"activations": "int2"}, "activations='int2' is unknown"),
        ({"column_power": 3}, r"column_power must lie in \[0, 2\], got 3"),
        ({"column_power": "x"}, "column_power must lie"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        Recipe(**settings)
    with pytest.raises(UnsupportedError, match="recipe 'best' is unknown; choose one of tonfa, svdquant"):
        named_recipe("best")


def test_unsigned_bias_holds_the_shift() -> None:
    weight, bias = dense()
    found = quantize_linear(
        weight, bias, named_recipe("svdquant", RANK), moments=moments_of(True), unsigned=True, dtype=torch.float32
    )
    shift = GELU_SHIFT * (found.residual() / found.smooth_factor).sum(dim=1)
    assert torch.allclose(found.bias, bias - shift, atol=1e-5)
