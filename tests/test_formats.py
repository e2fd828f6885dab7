"""Every number format: round trips exact, errors bounded by half a step, the published rounding to the bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tonfa.errors import FormatError
from tonfa.formats import FORMATS, FP8, INT4, INT8, UINT4

INTEGER_FORMATS = {"int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127)}


def data(rows: int, channels: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, channels, generator=generator) * torch.rand(rows, 1, generator=generator) * 9).to(dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_pack_and_unpack_are_exact_inverses_on_every_byte(name: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat(64, 1)
    codes = FORMATS[name].unpack(packed)
    assert torch.equal(FORMATS[name].pack(codes), packed)


@pytest.mark.parametrize("name", INTEGER_FORMATS)
def test_unpacked_codes_cover_the_whole_range(name: str) -> None:
    low, high = INTEGER_FORMATS[name]
    codes = FORMATS[name].unpack(torch.arange(256, dtype=torch.uint8).view(1, -1)).int()
    assert sorted(set(codes.flatten().tolist())) == list(range(low, high + 1))


def test_low_nibble_is_the_even_channel() -> None:
    codes = torch.tensor([[1, -2, 7, -8]], dtype=torch.int8)
    assert INT4.pack(codes).tolist() == [[0x1 | 0xE << 4, 0x7 | 0x8 << 4]]
    assert UINT4.pack(torch.tensor([[1, 14]], dtype=torch.uint8)).tolist() == [[0x1 | 0xE << 4]]


@given(
    seed=st.integers(0, 2**31), exponent=st.integers(-20, 20), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
@settings(max_examples=50, deadline=None)
@pytest.mark.parametrize("name", FORMATS)
def test_error_is_at_most_half_a_step(name: str, seed: int, exponent: int, dtype: torch.dtype) -> None:
    x = (data(3, 128, seed) * 2.0**exponent).to(dtype)
    x = x.abs() if name == "uint4" else x
    codes, scales = FORMATS[name].quantize(x)
    exact = x.float()
    error = (FORMATS[name].dequantize(codes, scales) - exact).abs()
    if name == "fp8":
        bound = torch.maximum(exact.abs() * 2.0**-4, scales * 2.0**-10)
    else:
        groups = scales.shape[1]
        step = scales.float().repeat_interleave(128 // groups, dim=1)
        absmax = exact.unflatten(1, (groups, -1)).abs().amax(2).repeat_interleave(128 // groups, dim=1)
        bound = step * 0.5 + (absmax * 2.0**-8 if dtype == torch.bfloat16 and name.endswith("int4") else 0)
    assert torch.all(error <= bound * (1 + 1e-5))


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_have_scale_zero_and_stay_zero(name: str) -> None:
    x = torch.zeros(2, 128)
    x[1, 5] = 3.0
    codes, scales = FORMATS[name].quantize(x)
    assert torch.equal(FORMATS[name].dequantize(codes, scales)[0], x[0])
    assert scales[0].eq(0).all()
    assert scales.isfinite().all()


def test_4_bit_codes_come_from_the_unrounded_scale() -> None:
    """absmax 1.01 in bf16 is 1.0078125; x / (absmax / 7) decides the code, though the scale that is kept is rounded."""
    x = data(50, 64, 0, torch.bfloat16)
    codes, scales = INT4.quantize(x)
    exact = x.float().abs().amax(1, keepdim=True) * (1.0 / 7)
    assert torch.equal(codes, (x.float() * exact.reciprocal()).round().clamp(-8, 7).to(torch.int8))
    assert scales.dtype == torch.bfloat16
    assert torch.equal(scales, exact.to(torch.bfloat16))
    assert not torch.equal(scales.float(), exact)


def test_ties_go_to_even() -> None:
    x = torch.zeros(1, 64)
    x[0, :4] = torch.tensor([7.0, 0.5, 1.5, 2.5])
    assert INT4.quantize(x)[0][0, :4].tolist() == [7, 0, 2, 2]
    y = torch.tensor([[127.0, 0.5, 1.5, -2.5]])
    assert INT8.quantize(y)[0].tolist() == [[127, 0, 2, -2]]


def test_row_int8_keeps_to_its_levels() -> None:
    codes, _ = replace(INT8, largest=63).quantize(data(8, 256, 1))
    assert codes.abs().max() == 63


def test_fp8_reaches_its_largest_value_and_no_nan() -> None:
    codes, _ = FP8.quantize(data(8, 256, 2) * 1e30)
    values = codes.float()
    assert values.abs().max() == 448
    assert values.isfinite().all()


@pytest.mark.parametrize("x", [torch.zeros(64), torch.zeros(2, 64, dtype=torch.int32)], ids=["vector", "integers"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_no_float_matrix_is_refused(name: str, x: torch.Tensor) -> None:
    with pytest.raises(FormatError, match=f"{name}: expected a float matrix"):
        FORMATS[name].quantize(x)


def test_a_ragged_group_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match="K = 100 is no multiple of the group size 64"):
        INT4.quantize(torch.zeros(1, 100))
