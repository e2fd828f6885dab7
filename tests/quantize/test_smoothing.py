"""Smoothing: the published grid, compared with brute force, and learned factors that lower the error."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from support import relative_error
from tonfa.formats import FP8, GELU_SHIFT, INT4, INT8
from tonfa.quantizer.judge import Judge, quantized_input, widened
from tonfa.quantizer.learned import _Cost, _input_grid, learn_smoothing
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.recipe import _round_absmax
from tonfa.quantizer.smoothing import candidates, search_smoothing, smoothing, spans

ROUND = partial(_round_absmax, dtype=torch.bfloat16)


def layer(k: int = 128, tokens: int = 512, unsigned: bool = False) -> tuple[list[Tensor], InputMoments]:
    """Two weights that share an input with outlier channels, where their columns are small."""
    g = torch.Generator().manual_seed(0)
    scales = (0.5 * torch.randn(k, generator=g)).exp()
    scales[::40] *= 20
    x = torch.randn(tokens, k, generator=g)
    x = (torch.nn.functional.gelu(x) if unsigned else x) * scales
    moments = InputMoments.empty("block.1", k)
    moments.add(x.bfloat16())
    return [torch.randn(n, k, generator=g) / scales**0.5 for n in (96, 64)], moments


def test_the_grid_is_the_released_one() -> None:
    found = candidates()
    assert len(found) == len(set(found)) == 39
    assert found[0] == (0, 0)
    assert {(0.05, 0.0), (0.95, 0.0), (0.5, 0.5)} <= set(found)
    assert all(b == 0 or a + b == pytest.approx(1) for a, b in found)


def test_spans_are_over_all_weights() -> None:
    weights, moments = layer()
    both = torch.cat(weights)
    assert torch.equal(spans(weights, moments, "absmax")[1], both.abs().amax(dim=0))
    assert torch.allclose(spans(weights, moments, "rms")[1], both.square().mean(dim=0).sqrt())


def test_dead_channels_and_extremes_get_a_factor() -> None:
    x, w = torch.tensor([0.0, 4.0, 1e30, 4.0]), torch.tensor([1.0, 0.0, 1e-30, 1.0])
    assert smoothing(x, w, 0.5, 0.5, torch.float16).tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("unsigned", [False, True])
def test_search_finds_the_best_of_the_grid(unsigned: bool) -> None:
    """Every candidate again, with exact decompositions and the products written out."""
    weights, moments = layer(unsigned=unsigned)
    x, best = moments.sample.float(), (float("inf"), torch.zeros(0))
    x_span, w_span = moments.absmax, torch.cat(weights).abs().amax(dim=0)
    for alpha, beta in candidates():
        smooth = (x_span**alpha / w_span**beta).bfloat16().float()
        error = 0.0
        for weight in weights:
            u, s, v = torch.linalg.svd(weight * smooth)
            branch = (u[:, :16] * s[:16]) @ v[:16]
            groups = (weight * smooth - branch).unflatten(1, (-1, 64))
            steps = (groups.abs().amax(dim=2, keepdim=True) / 7).bfloat16().float()
            rounded = ((groups / steps).round().clamp(-7, 7) * steps).flatten(1)
            shifted = (x + GELU_SHIFT).bfloat16().float() if unsigned else x
            inputs = (shifted / smooth).bfloat16().float().unflatten(1, (-1, 64))
            unit = inputs.abs().amax(dim=2, keepdim=True) / (15 if unsigned else 7)
            inputs = ((inputs / unit).round().clamp(0 if unsigned else -8, 15) * unit.bfloat16().float()).flatten(1)
            if unsigned:
                inputs = inputs - GELU_SHIFT / smooth
            error += float((inputs @ rounded.T + (x / smooth) @ branch.T - x @ weight.T).square().sum())
        if error <= best[0]:
            best = error, smooth
    found = search_smoothing(weights, moments, ROUND, rank=16, unsigned=unsigned)
    assert torch.equal(found.float(), best[1])


def test_the_judge_knows_what_the_products_read() -> None:
    x, one = torch.randn(32, 128).bfloat16(), torch.ones(128).bfloat16()
    assert torch.equal(quantized_input(x, one, "none", False), x.float())
    assert torch.equal(quantized_input(x, one, "int8", True), INT8.dequantize(*INT8.quantize(x)))
    unsigned = quantized_input(x.abs(), one, "int4", True)
    assert 0 < relative_error(unsigned, x.abs()) < 0.1
    weight = torch.randn(48, 128)
    assert torch.equal(widened(weight, "fp8"), FP8.dequantize(*FP8.quantize(weight)))
    assert widened(weight, "int4") is weight
    exact = Judge(x, weight, "none", False).error(one, torch.zeros_like(weight), weight)
    assert exact == pytest.approx(float((x.float() @ weight.T).square().sum()), rel=1e-4)


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("activations", ["int4", "int8", "fp8"])
def test_learned_factors_beat_their_start(unsigned: bool, activations: str) -> None:
    """Rounded to nearest after a one-shot branch, on tokens that were not used to learn."""
    weights, moments = layer(tokens=1024, unsigned=unsigned)
    start = smoothing(*spans(weights, moments, "rms"), 0.5, 0.5, torch.bfloat16)
    found = learn_smoothing(weights, moments, rank=16, activations=activations, unsigned=unsigned)
    assert (found.dtype, found.shape) == (torch.bfloat16, (128,))

    def error(smooth: Tensor) -> float:
        values, total = smooth.float(), 0.0
        for weight in weights:
            u, s, v = torch.linalg.svd(weight * values)
            rest = weight * values - (u[:, :16] * s[:16]) @ v[:16]
            rounded = INT4.dequantize(*ROUND(rest))
            total += Judge(moments.sample, weight, activations, unsigned).error(smooth, rounded, rest)
        return total

    assert error(found) < error(start)
    assert error(found) < 0.8 * error(torch.ones_like(start))


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("activations", ["int4", "int8", "fp8"])
def test_the_slope_is_that_of_automatic_differentiation(unsigned: bool, activations: str) -> None:
    """Of the formula written plainly, with codes that have no derivative."""
    (rows, _), moments = layer(tokens=96, unsigned=unsigned)
    x = moments.sample.float() + (GELU_SHIFT if unsigned and activations == "int4" else 0)
    g = torch.Generator().manual_seed(1)
    remaining, power = torch.rand(2, 128, generator=g) + 0.1
    logarithm = torch.randn(128, generator=g).requires_grad_(True)
    smooth = logarithm.exp()

    def noise(values: Tensor, group: int, levels: float, lowest: int, highest: int) -> Tensor:
        groups = values.unflatten(1, (-1, group))
        step = groups.abs().amax(dim=2, keepdim=True) / levels
        codes = (groups / step).round().clamp(lowest, highest).detach()
        return (step * codes - groups).square().sum(dim=0).flatten()

    cost = (noise(rows * smooth, 64, 8 / 0.95, -8, 7) * remaining / smooth**2).sum() / 0.5
    if activations != "fp8":
        group, levels = (128, 127) if activations == "int8" else (64, 15 if unsigned else 7)
        lowest = 0 if levels == 15 else -levels
        cost = cost + (noise(x / smooth, group, levels, lowest, levels) * smooth**2 * power).sum() / 96
    cost.backward()
    found = _Cost(x, remaining, power, rows, 0.5, _input_grid(activations, unsigned, 128))
    assert found(logarithm.detach()) == pytest.approx(cost.item(), rel=1e-5)
    assert logarithm.grad is not None
    assert relative_error(found.slope(logarithm.detach()), logarithm.grad) < 1e-4


def test_learning_is_deterministic_and_works_in_inference_mode() -> None:
    weights, moments = layer()
    found = learn_smoothing(weights, moments, rank=16)
    with torch.inference_mode():
        inside = [w.clone() for w in weights]
        assert torch.equal(learn_smoothing(inside, moments.to("cpu"), rank=16), found)
