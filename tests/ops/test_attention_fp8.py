"""The specification of FP8 attention: what its scales promise, and what its rounding costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import attention_inputs, attention_norms, relative_error
from tonfa.ops import attention, attention_fp8


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.reference(q.double(), k.double(), v.double())


@pytest.mark.parametrize(
    ("bound", "exponent"),
    [
        (448.0, 0),
        (448.001, -1),
        (224.0, 1),
        (1.75, 8),
        (1.7500001, 7),
        (1.0, 8),
        (0.0, 38),
        (2.0**-30, 38),
        (3e38, -52),
    ],
)
def test_exponents_are_the_largest_that_do_not_saturate(bound: float, exponent: int) -> None:
    assert attention_fp8.largest_exponents(torch.tensor(bound)) == exponent


@pytest.mark.parametrize("weights", [[torch.tensor([1.0, -4.0, 2.0, 0.5])], [torch.ones(4), torch.full((4,), -3.0)]])
def test_no_normed_and_rotated_vector_exceeds_the_bound_but_one_reaches_it(weights: list[Tensor]) -> None:
    bound = float(attention_fp8.norm_bound(weights))
    channel = torch.eye(4) * 7  # all of the length in one channel
    channel *= torch.rsqrt(channel.square().mean(-1, keepdim=True))
    most = 0.0
    for w in weights:
        normed = channel * w
        for angle in torch.linspace(0, 6.3, 64):
            turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
            rotated = (normed.unflatten(-1, (2, 2)) @ turn.T).flatten(-2)
            most = max(most, float(rotated.abs().max()))
    assert bound * 0.999 < most <= bound * 1.000001


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "common", "heads", "zeros"])
def test_nothing_saturates_and_scaling_rounds_nothing(kind: str) -> None:
    q, k, v = attention_inputs(kind, 2, 3, 40, 32)
    rest = attention_fp8.centered(v, attention_fp8.center(v))
    scales = attention_fp8.exponents(rest, *attention_norms(kind, 32))
    for x, exponent in ((q, scales.q), (k, scales.k), (rest, scales.v)):
        scaled = torch.ldexp(x.float(), exponent)
        assert scaled.abs().max() <= 448
        assert torch.equal(torch.ldexp(scaled, -exponent), x.float())
    assert torch.ldexp(rest, scales.v).abs().max() > 224


def by_maxima(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with the largest scale of every head of q, k and v that saturates nothing."""
    center = attention_fp8.center(v)
    v = attention_fp8.centered(v, center)
    scales = attention_fp8.Exponents(
        *(attention_fp8.largest_exponents(x.abs().amax((2, 3), keepdim=True)) for x in (q, k, v))
    )
    rounded = [attention_fp8.quantize(x, e) for x, e in ((q, scales.q), (k, scales.k), (v, scales.v))]
    return attention_fp8.dequantize(attention_fp8.attend(*rounded, scales), scales.v.transpose(1, 2), center, q.dtype)


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "common", "heads"])
def test_bounds_cost_nothing_against_maxima_of_each_head(kind: str) -> None:
    q, k, v = attention_inputs(kind, 1, 3, 512, 128)
    found = attention_fp8.reference(q, k, v, *attention_norms(kind, 128))
    expected, best = exact(q, k, v), by_maxima(q, k, v)
    for head in range(3):  # also the smallest one of "heads", although all share a scale
        part = slice(head * 128, (head + 1) * 128)
        error = relative_error(found[..., part], expected[..., part])
        assert 0.02 < error < 0.1
        assert error < 1.03 * relative_error(best[..., part], expected[..., part])


@pytest.mark.parametrize("center", [torch.zeros(48), torch.linspace(-3, 3, 48)], ids=["without", "with"])
def test_one_token_is_its_value_rounded_around_the_center(center: Tensor) -> None:
    q, k, v = attention_inputs("gaussian", 2, 3, 1, 16)
    center = center.bfloat16()
    scales = attention_fp8.exponents(attention_fp8.centered(v, center), *attention_norms("gaussian", 16))
    heads = attention_fp8.round_heads(q, k, v, center, scales)
    out = attention_fp8.dequantize(attention_fp8.attend(heads.q, heads.k, heads.v, scales), scales.v, center, v.dtype)
    rest = v.transpose(1, 2).flatten(2).float() - center.float()
    rounded = attention_fp8.quantize(rest, scales.v).float()
    assert torch.equal(out, (torch.ldexp(rounded, -scales.v) + center.float()).to(v.dtype))
    assert heads.center is center


def test_what_all_tokens_have_in_common_is_not_rounded_to_e4m3() -> None:
    q, k, v = attention_inputs("center", 1, 2, 512, 128)
    found = attention_fp8.reference(q, k, v, *attention_norms("center", 128))
    assert relative_error(found, exact(q, k, v)) < 4e-3


def test_zeros_stay_zeros() -> None:
    zeros, w = torch.zeros(1, 2, 9, 16, dtype=torch.bfloat16), [torch.ones(16)]
    found = attention_fp8.reference(zeros, zeros, zeros, w, w)
    assert torch.equal(found, torch.zeros(1, 9, 32, dtype=torch.bfloat16))
