"""The number formats of SVDQuant, each one object that can quantize, dequantize, pack and unpack.

A format maps a float matrix (M, K) to codes (M, K) and scales. 4-bit formats scale groups of 64 neighbors in K, 8-bit
formats scale whole rows. The arithmetic of the 4-bit formats is the published one (Nunchaku's quantize kernel): codes
come from the unrounded float32 scale, the scale that is kept is rounded to the 16-bit dtype of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tonfa.errors import FormatError

GROUP_SIZE = 64
"""Neighbors in K that share one 4-bit scale: the published checkpoints know no other size."""

GELU_SHIFT = 0.171875
"""Added to a GELU's output so that it is not negative (GELU's minimum is -0.16997) and fits an unsigned format."""


class Format(Protocol):
    """What every number format offers."""

    @property
    def name(self) -> str:
        """The name that users and checkpoints write."""
        ...

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, K) float -> codes (M, K), scales (M, groups)."""
        ...

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """codes (M, K), scales (M, groups) -> (M, K) of `dtype`."""
        ...

    def pack(self, codes: Tensor) -> Tensor:
        """codes (M, K) -> the bytes that are stored, uint8 (M, bytes)."""
        ...

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`, exact."""
        ...


def _check_matrix(x: Tensor, group_size: int | None, name: str) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise FormatError(f"{name}: expected a float matrix (M, K), got {x.dtype} of shape {tuple(x.shape)}")
    if group_size is not None and x.shape[1] % group_size:
        raise FormatError(f"{name}: K = {x.shape[1]} is no multiple of the group size {group_size}; pad the channels")


@dataclass(frozen=True)
class GroupInt4:
    """4-bit integers, one scale for each row and group of `group_size` channels.

    Signed codes lie in [-8, 7] (absmax scaling reaches -7 only), unsigned ones in [0, 15].
    """

    name: str
    unsigned: bool
    group_size: int = GROUP_SIZE

    @property
    def absmax(self) -> int:
        """The code that the largest magnitude of a group is given."""
        return 15 if self.unsigned else 7

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of unpacked codes."""
        return torch.uint8 if self.unsigned else torch.int8

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, K) float -> codes (M, K) int8 or uint8, scales (M, K/G) of x's dtype.

        scale = absmax * fp32(1/7 or 1/15); codes = round half to even of x / scale; a group of zeros gets scale 0.
        """
        _check_matrix(x, self.group_size, self.name)
        groups = x.float().unflatten(1, (-1, self.group_size))
        scales = groups.abs().amax(dim=2) * (1.0 / self.absmax)
        reciprocal = torch.where(scales > 0, scales.reciprocal(), 0.0)
        low, high = (0, 15) if self.unsigned else (-8, 7)
        codes = (groups * reciprocal.unsqueeze(2)).round_().clamp_(low, high).flatten(1)
        return codes.to(self.code_dtype), scales.to(x.dtype)

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """codes (M, K), scales (M, K/G) -> (M, K) of `dtype`."""
        groups: Tensor = codes.to(dtype).unflatten(1, (-1, self.group_size))
        return (groups * scales.to(dtype).unsqueeze(2)).flatten(1)

    def pack(self, codes: Tensor) -> Tensor:
        """codes (M, K) -> uint8 (M, K/2): even k in bits 0-3, odd k in bits 4-7, two's complement if signed."""
        if codes.ndim != 2 or codes.shape[1] % 2:
            raise FormatError(f"{self.name}: expected codes (M, K) with even K, got shape {tuple(codes.shape)}")
        nibbles = codes.to(torch.int8).bitwise_and(15).view(torch.uint8)
        return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)

    def unpack(self, packed: Tensor) -> Tensor:
        """uint8 (M, K/2) -> codes (M, K)."""
        if self.unsigned:
            low, high = packed & 15, packed >> 4
        else:
            low, high = (packed << 4).view(torch.int8) >> 4, packed.view(torch.int8) >> 4
        return torch.stack((low, high), dim=2).flatten(1)


@dataclass(frozen=True)
class RowFormat:
    """8-bit integers or floats in [-largest, largest], one float32 scale for each row."""

    name: str
    largest: int
    code_dtype: torch.dtype

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, K) float -> codes (M, K) of `code_dtype`, scales (M, 1) float32.

        scale = absmax * fp32(1 / largest); codes = x / scale, rounded half to even; a row of zeros gets scale 0.
        """
        _check_matrix(x, None, self.name)
        x = x.float()
        scales = x.abs().amax(dim=1, keepdim=True) * (1.0 / self.largest)
        values = x * torch.where(scales > 0, scales.reciprocal(), 0.0)
        if not self.code_dtype.is_floating_point:
            values = values.round_()
        return values.clamp_(-self.largest, self.largest).to(self.code_dtype), scales

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """codes (M, K), scales (M, 1) -> (M, K) of `dtype`."""
        return codes.to(dtype) * scales.to(dtype)

    def pack(self, codes: Tensor) -> Tensor:
        """Codes are bytes already."""
        return codes.view(torch.uint8)

    def unpack(self, packed: Tensor) -> Tensor:
        """The inverse of `pack`."""
        return packed.view(self.code_dtype)


INT4 = GroupInt4("int4", unsigned=False)
UINT4 = GroupInt4("uint4", unsigned=True)
INT8 = RowFormat("int8", 127, torch.int8)
FP8 = RowFormat("fp8", 448, torch.float8_e4m3fn)
FORMATS: dict[str, Format] = {f.name: f for f in (INT4, UINT4, INT8, FP8)}
"""Every number format by name; the round-trip tests take all of them."""
