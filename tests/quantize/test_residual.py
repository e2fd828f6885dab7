"""The 4-bit residual: never worse than rounding to nearest, codes that belong to the stored scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support import DEVICES, relative_error
from tonfa.formats import INT4
from tonfa.quantizer import chunks
from tonfa.quantizer.residual import quantize_residual

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def decoded(residual: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scales = quantize_residual(residual, dtype)
    return INT4.dequantize(codes, scales)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gains_of_sign_and_search_on_gaussian_weights(dtype: torch.dtype, device: str) -> None:
    """The figures of the module's docstring: 0.1076 for absmax / 7, 0.0949 for -extreme / 8, 0.0904 here."""
    residual = torch.randn(256, 1024)
    assert relative_error(INT4.dequantize(*INT4.quantize(residual)), residual) == pytest.approx(0.1076, abs=5e-4)
    found = decoded(residual.to(device), dtype).cpu()
    assert relative_error(found, residual) == pytest.approx(0.0904, abs=5e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_nearest_to_the_stored_scales(dtype: torch.dtype) -> None:
    residual = torch.randn(64, 256)
    codes, scales = quantize_residual(residual, dtype)
    assert (codes.dtype, scales.dtype) == (torch.int8, dtype)
    levels = torch.arange(-8, 8) * scales.float().repeat_interleave(64, dim=1).unsqueeze(2)
    nearest = (levels - residual.unsqueeze(2)).abs().amin(dim=2)
    assert torch.allclose((INT4.dequantize(codes, scales) - residual).abs(), nearest, atol=1e-6)


def test_all_sixteen_codes_and_both_signs_of_scales_are_used() -> None:
    codes, scales = quantize_residual(torch.randn(256, 256), torch.bfloat16)
    assert set(codes.unique().tolist()) == set(range(-8, 8))
    assert (scales > 0).any()
    assert (scales < 0).any()


def test_values_on_the_grid_are_exact() -> None:
    codes = torch.randint(-8, 8, (32, 128))
    codes[:, ::64] = -8
    scales = torch.tensor([0.25, -0.5]).repeat(32, 1)
    residual = INT4.dequantize(codes, scales)
    assert torch.equal(decoded(residual, torch.bfloat16), residual)


def test_zero_groups_have_zero_scale_and_codes() -> None:
    residual = torch.randn(4, 128)
    residual[:, 64:] = 0
    codes, scales = quantize_residual(residual, torch.float16)
    assert not codes[:, 64:].any()
    assert not scales[:, 1].any()


@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1e4])
def test_extreme_magnitudes_stay_finite(magnitude: float) -> None:
    residual = magnitude * torch.randn(8, 64)
    for dtype in DTYPES:
        found = decoded(residual, dtype)
        assert torch.isfinite(found).all()
        assert (found - residual).norm() <= residual.norm()


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    residual = torch.randn(37, 192)
    whole = quantize_residual(residual, torch.bfloat16)
    monkeypatch.setattr(chunks, "CPU_CHUNK", 5 * 192)
    for found, expected in zip(quantize_residual(residual, torch.bfloat16), whole, strict=True):
        assert torch.equal(found, expected)


@given(st.integers(0, 2**31), st.floats(0.1, 30), st.sampled_from(DTYPES))
def test_never_worse_than_a_full_range_scale(seed: int, tail: float, dtype: torch.dtype) -> None:
    """Shrinking the range by nothing is one of the candidates, in every group."""
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(4, 192, generator=generator) * (1 + tail * torch.rand(4, 192, generator=generator) ** 8)
    groups = residual.unflatten(1, (-1, 64))
    extreme = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scales = (-extreme / 8).to(dtype).float()
    plain = ((groups / scales).round().clamp(-8, 7) * scales - groups).square().sum(dim=2)
    found = (decoded(residual, dtype) - residual).unflatten(1, (-1, 64)).square().sum(dim=2)
    assert (found <= plain * (1 + 1e-5) + 1e-12).all()
