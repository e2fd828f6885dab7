"""The specification of FP8 attention: what its scales promise, and what its rounding costs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import attention_inputs, relative_error
from tonfa.ops import attention, attention_fp8


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention.reference(q.double(), k.double(), v.double())


def without_smoothing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scales = attention_fp8.exponents(q, k, v)
    rounded = [attention_fp8.quantize(x, e) for x, e in ((q, scales.q), (k, scales.k), (v, scales.v))]
    return attention_fp8.dequantize(attention_fp8.attend(*rounded, scales), scales.v, q.dtype)


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


@pytest.mark.parametrize("kind", ["gaussian", "outliers", "common", "heads", "zeros"])
def test_scales_share_one_product_and_saturate_nothing(kind: str) -> None:
    q, k, v = attention_inputs(kind, 2, 3, 40, 32)
    scales = attention_fp8.exponents(q, k, v)
    assert (scales.q + scales.k).unique().numel() == 1
    for x, exponent in ((q, scales.q), (attention_fp8.smooth(k), scales.k), (v, scales.v)):
        scaled = torch.ldexp(x.float(), exponent[..., None, None])
        assert scaled.abs().max() <= 448
        assert torch.equal(torch.ldexp(scaled, -exponent[..., None, None]), x.float())
    largest = torch.ldexp(v.float(), scales.v[..., None, None]).abs().amax((2, 3))
    assert ((largest > 224) | (largest == 0)).all()


def test_smoothing_leaves_attention_as_it_is() -> None:
    q, k, v = (t.double() for t in attention_inputs("common", 1, 2, 50, 32))
    torch.testing.assert_close(exact(q, attention_fp8.smooth(k), v), exact(q, k, v))


@pytest.mark.parametrize(
    ("kind", "most"), [("gaussian", 0.065), ("outliers", 0.15), ("common", 0.065), ("heads", 0.065)]
)
def test_error(kind: str, most: float) -> None:
    q, k, v = attention_inputs(kind, 1, 3, 512, 128)
    expected = exact(q, k, v)
    error = relative_error(attention_fp8.reference(q, k, v), expected)
    assert 0.02 < error < most
    if kind == "common":
        assert relative_error(without_smoothing(q, k, v), expected) > 5 * error
    if kind == "heads":  # the smallest head is as good as the largest
        found = attention_fp8.reference(q, k, v)
        for head in range(3):
            part = slice(head * 128, (head + 1) * 128)
            assert relative_error(found[..., part], expected[..., part]) < most


def test_one_token_is_its_value_rounded() -> None:
    q, k, v = attention_inputs("gaussian", 2, 3, 1, 16)
    exponent = attention_fp8.exponents(q, k, v).v
    rounded = torch.ldexp(attention_fp8.quantize(v, exponent).float(), -exponent[..., None, None])
    assert torch.equal(attention_fp8.reference(q, k, v).float(), rounded.transpose(1, 2).flatten(2))


def test_zeros_stay_zeros() -> None:
    zeros = torch.zeros(1, 2, 9, 16, dtype=torch.bfloat16)
    assert torch.equal(attention_fp8.reference(zeros, zeros, zeros), torch.zeros(1, 9, 32, dtype=torch.bfloat16))
