"""A modulation as W4A16Weights: asymmetric groups, 1 in the bias of the scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support import DEVICES, relative_error
from tonfa.errors import FormatError
from tonfa.formats import UINT4
from tonfa.quantizer import chunks
from tonfa.quantizer.modulation import quantize_modulation

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_on_gaussian_weights(dtype: torch.dtype, device: str) -> None:
    """The figure of the module's docstring; the range alone has 0.0897."""
    weight = torch.randn(256, 1024).to(device, dtype)
    found = quantize_modulation(weight, None)
    found.check()
    assert found.wscales.dtype == dtype
    assert relative_error(found.dense()[0], weight) == pytest.approx(0.0848, abs=7e-4)


@given(st.integers(0, 2**31), st.floats(-20, 20), st.sampled_from(DTYPES))
def test_never_worse_than_the_range(seed: int, offset: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randn(8, 2, 64, generator=generator) + offset
    zeros = groups.amin(dim=2, keepdim=True).to(dtype).float()
    scales = ((groups.amax(dim=2, keepdim=True) - zeros) / 15).to(dtype).float()
    codes = ((groups - zeros) / scales).round().clamp(0, 15)
    plain = (codes * scales + zeros - groups).square().sum(dim=2)
    found = quantize_modulation(groups.flatten(1), None, dtype=dtype).dense()[0].unflatten(1, (-1, 64))
    assert ((found - groups).square().sum(dim=2) <= plain * (1 + 1e-4) + 1e-9).all()


def test_values_on_the_grid_are_exact() -> None:
    codes = torch.randint(0, 16, (8, 64))
    codes[:, 0], codes[:, 1] = 0, 15
    found = quantize_modulation((0.25 * codes - 2.0).bfloat16(), None)
    assert torch.equal(UINT4.unpack(found.qweight), codes.to(torch.uint8))
    assert (found.wscales == 0.25).all()
    assert (found.wzeros == -2).all()


def test_constant_groups_are_exact() -> None:
    weight = torch.tensor([0.0, 0.5, -3.0]).unsqueeze(1).expand(3, 64).contiguous()
    assert torch.equal(quantize_modulation(weight, None).dense()[0], weight)


def test_one_is_added_to_the_bias_of_the_scales() -> None:
    bias = torch.randn(192)
    found = quantize_modulation(torch.randn(192, 64), bias, ((32, 64), (128, 160)))
    expected = bias.clone()
    expected[32:64] += 1
    expected[128:160] += 1
    assert torch.equal(found.bias, expected)
    assert not torch.equal(bias, expected)
    assert quantize_modulation(torch.randn(192, 64), None, ((0, 1),)).bias.tolist() == [1.0] + [0.0] * 191


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 128).bfloat16()
    whole = quantize_modulation(weight, None).tensors()
    monkeypatch.setattr(chunks, "CPU_CHUNK", 1)
    for name, found in quantize_modulation(weight, None).tensors().items():
        assert torch.equal(found, whole[name]), name


def test_bad_weights_are_named() -> None:
    with pytest.raises(FormatError, match=r"norm1\.weight: K = 96"):
        quantize_modulation(torch.zeros(8, 96), None, name="norm1")
    with pytest.raises(FormatError, match=r"norm1\.weight: holds NaN"):
        quantize_modulation(torch.full((8, 64), torch.nan), None, name="norm1")
