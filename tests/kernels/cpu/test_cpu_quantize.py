"""The CPU's quantize: codes and scales equal to the reference's bit by bit, the low-rank part within its rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import outlier_input, relative_error
from tonfa.errors import FormatError
from tonfa.kernels.cpu.quantize import lowrank, pack_input, quantize
from tonfa.ops import quantize as op
from tonfa.ops.activation import InputWeights, QuantizedActivation
from tonfa.weights import FLOAT_DTYPES


def inputs(k: int, generator: torch.Generator, dtype: torch.dtype = torch.bfloat16, rank: int = 32) -> InputWeights:
    smooth_factor = torch.rand(k, generator=generator) * 2 + 0.25
    down = torch.randn(k, rank, generator=generator) / k**0.5
    return InputWeights(smooth_factor.to(dtype), down.to(dtype), False, "int8")


def assert_equal_codes(found: QuantizedActivation, expected: QuantizedActivation) -> None:
    assert found.scales is not None and expected.scales is not None
    assert found.codes.dtype == expected.codes.dtype and found.scales.dtype == expected.scales.dtype
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales, expected.scales)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (7, 192), (300, 1024)])
def test_codes_and_scales_are_the_references(
    rows: int, channels: int, dtype: torch.dtype, threads: int, generator: torch.Generator
) -> None:
    w = inputs(channels, generator, dtype)
    x = outlier_input(rows, channels, generator, dtype)
    found, expected = quantize(x, pack_input(w)), op.reference(x, w)
    assert_equal_codes(found, expected)
    assert found.lowrank is not None and expected.lowrank is not None
    assert found.lowrank.dtype == torch.float32
    exact = x.double() @ w.proj_down.double()
    plain = lowrank(x, w.proj_down) if dtype == torch.bfloat16 else expected.lowrank
    assert relative_error(found.lowrank, exact) <= 2 * relative_error(plain, exact)
    assert relative_error(found.lowrank, exact) < (2**-8 if dtype == torch.bfloat16 else 1e-5)


@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 5),
    exponent=st.integers(-20, 20),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_codes_are_the_references_at_any_magnitude(
    rows: int, groups: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = inputs(64 * groups, generator, dtype, rank=1)
    x = (torch.randn(rows, 64 * groups, generator=generator) * 2.0**exponent).to(dtype)
    assert_equal_codes(quantize(x, pack_input(w)), op.reference(x, w))


def test_halves_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -127.0] * 8])
    w = InputWeights(torch.ones(64), torch.zeros(64, 1), False, "int8")
    assert quantize(x, pack_input(w)).codes[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, -127]


def test_rows_of_zeros_have_scale_zero(generator: torch.Generator) -> None:
    w = inputs(128, generator)
    x = torch.zeros(3, 128).bfloat16()
    x[1] = 1
    found = quantize(x, pack_input(w))
    assert_equal_codes(found, op.reference(x, w))
    assert found.scales is not None and found.scales[0] == 0 and not found.codes[2].any()


def test_leading_dimensions_strides_and_no_rows(generator: torch.Generator) -> None:
    w = inputs(64, generator)
    x = outlier_input(24, 128, generator).view(2, 12, 128)[:, :, ::2]
    assert not x.is_contiguous()
    assert_equal_codes(quantize(x, pack_input(w)), op.reference(x, w))
    assert quantize(torch.empty(0, 64).bfloat16(), pack_input(w)).codes.shape == (0, 64)


def test_a_wrong_input_is_refused(generator: torch.Generator) -> None:
    packed = pack_input(inputs(64, generator))
    with pytest.raises(FormatError, match="expected 64 channels"):
        quantize(torch.ones(2, 128), packed)
    with pytest.raises(FormatError, match="float64"):
        quantize(torch.ones(2, 64).double(), packed)
