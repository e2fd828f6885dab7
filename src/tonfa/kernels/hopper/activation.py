"""A quantized input in this backend's layout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tonfa.ops.activation import QuantizedActivation


@dataclass(frozen=True)
class HopperActivation(QuantizedActivation):
    """`codes` (K/128, M padded, 128), `scales` (M,) float32 and `lowrank` (R/64, M padded, 64) bf16: see layout.py.

    `scales` are the first of M padded in memory. `lowrank` is divided by the row's scale, so that the product can begin
    its sums with the branch.
    """

    scales: Tensor
    lowrank: Tensor
    rows: int  # M
    channels: int  # K
    rank_start: int  # the first of this linear's columns of lowrank
    rank: int
    norms: Tensor | None = None
    """(M,) float32 or more: at least the l2 norm of each row of codes * scales."""

    def split(self, ranks: tuple[int, ...]) -> tuple[QuantizedActivation, ...]:
        """The same input for each of several linears, with its own columns of `lowrank`."""
        parts, start = [], self.rank_start
        for rank in ranks:
            part = HopperActivation(
                self.codes, self.scales, self.lowrank, self.dtype, self.rows, self.channels, start, rank, self.norms
            )
            parts.append(part)
            start += rank
        return tuple(parts)
