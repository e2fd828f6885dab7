"""FLUX's rotary positions, in seven kernels where Diffusers' FluxPosEmbed takes seventy for the two streams."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from tonfa.ops.fused import Rotary

_THETA = 10000.0


@lru_cache(maxsize=16)
def _frequencies(axes_dims: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each pair of channels: its axis, and radians per position in float64 (float32 where there is no float64)."""
    axes = [axis for axis, size in enumerate(axes_dims) for _ in range(size // 2)]
    radians = [1.0 / _THETA ** (2 * i / size) for size in axes_dims for i in range(size // 2)]
    dtype = torch.float32 if device.type in ("mps", "npu") else torch.float64
    return torch.tensor(axes, device=device), torch.tensor(radians, dtype=dtype, device=device)


class RotaryPositions(nn.Module):
    """cos and sin of positions on several axes, each axis with its own part of a head's channels.

    They are computed in every step, because a graph's ids may change their values; angles are float64 as in Diffusers.
    """

    def __init__(self, axes_dims: Sequence[int]) -> None:
        super().__init__()
        self.axes_dims = tuple(axes_dims)

    def forward(self, ids: Tensor) -> Rotary:
        """(L, axes) -> (L, D) float32 each, every angle twice in a row."""
        axes, radians = _frequencies(self.axes_dims, ids.device)
        angles = ids.float()[:, axes] * radians
        tables = torch.empty((2, *angles.shape, 2), device=ids.device)
        tables[0] = angles.cos().unsqueeze(-1)
        tables[1] = angles.sin().unsqueeze(-1)
        cos, sin = tables.flatten(2)
        return cos, sin
