"""A quantized input in this backend's layout."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tonfa.kernels.cuda.contract import round_up
from tonfa.kernels.hopper.layout import ROW_BYTES, ROW_MULTIPLE
from tonfa.ops.activation import QuantizedActivation


@dataclass(frozen=True)
class HopperActivation(QuantizedActivation):
    """`codes` (K/128, M padded, 128), `scales` (M,) float32 and `lowrank` (R/64, M padded, 64) bf16: see layout.py.

    `scales` are the first of M padded in memory. `lowrank` is divided by the row's scale, so that the product can begin
    its sums with the branch. What is beyond the last rank may be anything.
    """

    scales: Tensor
    lowrank: Tensor
    rows: int  # M
    channels: int  # K
    rank_start: int  # the first of this linear's columns of lowrank
    rank: int
    norms: Tensor | None = None  # (M,) float32, at least the l2 norm of the row's codes * scale; not of every quantizer

    def split(self, ranks: tuple[int, ...]) -> tuple[QuantizedActivation, ...]:
        """The same input for each of several linears, with its own columns of `lowrank`."""
        parts, start = [], self.rank_start
        for rank in ranks:
            parts.append(replace(self, rank_start=start, rank=rank))
            start += rank
        return tuple(parts)


def empty_activation(
    rows: int, channels: int, rank: int, dtype: torch.dtype, device: torch.device, norms: Tensor | None = None
) -> HopperActivation:
    """Memory for a kernel to fill, zeros in the rows that it leaves out and products read."""
    m_pad = round_up(rows, ROW_MULTIPLE)
    codes = torch.empty((-(-channels // ROW_BYTES), m_pad, ROW_BYTES), dtype=torch.uint8, device=device)
    lowrank = torch.empty((-(-rank // 64), m_pad, 64), dtype=torch.bfloat16, device=device)
    scales = torch.empty(m_pad, device=device)[:rows]
    if rows != m_pad:
        codes[:, rows:].zero_()
        lowrank[:, rows:].zero_()
    return HopperActivation(codes, scales, lowrank, dtype, rows, channels, 0, rank, norms)
