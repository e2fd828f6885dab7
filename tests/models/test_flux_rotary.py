"""Rotary positions against Diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed

from support import DEVICES
from tonfa.models.flux.rotary import RotaryPositions


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("axes", [(16, 56, 56), (2, 6), (8, 4, 2, 2)])
def test_tables_are_diffusers(axes: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 128, (77, len(axes)), generator=generator).to(device, dtype)
    expected = FluxPosEmbed(theta=10000, axes_dim=list(axes))(ids)
    for found, table in zip(RotaryPositions(axes)(ids), expected, strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(found, table, rtol=2**-23, atol=1e-12)
