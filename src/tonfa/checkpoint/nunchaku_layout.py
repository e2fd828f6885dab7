"""Nunchaku's packed tensors: from logical order to the order in which its kernels read, and back, exactly.

W4A4 layers are tiled for `mma.m16n8k64`: N and K are padded to multiples of 128 and every tensor is permuted, also
those whose stored shape looks row-major. W4A16 layers interleave rows and nibbles for a vector product. The maps are
those of the published writer (deepcompressor's Nunchaku backend); each is a reshape and a permutation of dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.errors import FormatError

TILE = 128
"""N and K of a W4A4 layer are padded to multiples of this."""

RANK_TILE = 16

MODULATION_SCALE_ROWS = 16
"""The writer pads the groups of a W4A16 layer to multiples of this; the engine reads the first K / 64 rows."""

# Dimensions of the packed 4-bit codes in memory: n tile, k group, 16-row tile, row in 8, 8 channels, row half, k half,
# byte, nibble; the permutation makes (n tile, 16-row tile, half, row) and (k group, half, 8 channels, byte, nibble).
_CODES_TO_LOGICAL = (0, 2, 5, 3, 1, 6, 4, 7, 8)
_CODES_TO_PACKED = (0, 4, 1, 3, 6, 2, 5, 7, 8)


def padded(size: int, multiple: int = TILE) -> int:
    """`size` rounded up to a multiple."""
    return -(-size // multiple) * multiple


def _pad(tensor: Tensor, shape: tuple[int, ...], fill: float) -> Tensor:
    widths = [w for have, want in zip(reversed(tensor.shape), reversed(shape), strict=True) for w in (0, want - have)]
    return functional.pad(tensor, widths, value=fill) if any(widths) else tensor


def _require(what: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise FormatError(f"{what}: expected packed shape {expected}, got {tuple(tensor.shape)}")


def pack_codes(codes: Tensor) -> Tensor:
    """Signed 4-bit codes (N, K) int8 -> `qweight` (N, K/2) int8, both padded with code 0."""
    n, k = padded(codes.shape[0]), padded(codes.shape[1])
    nibbles = _pad(codes, (n, k), 0).bitwise_and(15).view(torch.uint8)
    tiles = nibbles.view(n // 128, 8, 2, 8, k // 64, 2, 4, 4, 2).permute(_CODES_TO_PACKED)
    return (tiles[..., 0] | (tiles[..., 1] << 4)).reshape(n, k // 2).view(torch.int8)


def unpack_codes(qweight: Tensor, n: int, k: int) -> Tensor:
    """`qweight` int8 -> signed codes (N, K) int8 without the padding."""
    rows, channels = padded(n), padded(k)
    _require("qweight", qweight, (rows, channels // 2))
    packed = qweight.view(torch.int8).view(rows // 128, channels // 64, 8, 8, 4, 2, 2, 4)
    nibbles = torch.stack((packed << 4 >> 4, packed >> 4), dim=-1)
    return nibbles.permute(_CODES_TO_LOGICAL).reshape(rows, channels)[:n, :k].contiguous()


def pack_scales(scales: Tensor) -> Tensor:
    """Scales (G, N) in logical order -> `wscales` (G, N), padded with ones in N and, to K of 128, in G."""
    groups, n = padded(scales.shape[0], 2), padded(scales.shape[1])
    tiles = _pad(scales, (groups, n), 1).view(groups, n // 128, 8, 2, 4, 2)
    return tiles.permute(1, 0, 2, 4, 3, 5).reshape(groups, n)


def unpack_scales(wscales: Tensor, groups: int, n: int) -> Tensor:
    """`wscales` -> scales (G, N) in logical order without the padding."""
    rows, columns = padded(groups, 2), padded(n)
    _require("wscales", wscales, (rows, columns))
    tiles = wscales.view(columns // 128, rows, 8, 4, 2, 2)
    return tiles.permute(1, 0, 2, 4, 3, 5).reshape(rows, columns)[:groups, :n].contiguous()


def pack_vector(vector: Tensor) -> Tensor:
    """A bias (N,) or smoothing factor (K,) -> the stored order, padded with ones."""
    tiles = _pad(vector, (padded(vector.shape[0]),), 1).view(-1, 8, 2, 4, 2)
    return tiles.permute(0, 1, 3, 2, 4).reshape(-1)


def unpack_vector(packed: Tensor, size: int) -> Tensor:
    """The inverse of `pack_vector`, without the padding."""
    _require("vector", packed, (padded(size),))
    return packed.view(-1, 8, 4, 2, 2).permute(0, 1, 3, 2, 4).reshape(-1)[:size].contiguous()


def pack_lowrank(matrix: Tensor, *, down: bool) -> Tensor:
    """`proj_down` (K, R) or `proj_up` (N, R) -> `lora_down` or `lora_up`; padded with zeros, R to a multiple of 16.

    Tiles of 16 x 16; inside, with (a, b) the rank and the channel for `down`, the channel and the rank otherwise, the
    place is (a % 8) * 32 + (b % 8 // 2) * 8 + (a // 8) * 4 + (b // 8) * 2 + b % 2.
    """
    channels, rank = padded(matrix.shape[0]), padded(matrix.shape[1], RANK_TILE)
    tiles = _pad(matrix, (channels, rank), 0).view(channels // 16, 16, rank // 16, 16).transpose(1, 2)
    ab = tiles.transpose(2, 3) if down else tiles
    fine = ab.reshape(channels // 16, rank // 16, 2, 8, 2, 4, 2)  # a half, a row, b half, b pair, b parity
    return fine.permute(0, 1, 3, 5, 2, 4, 6).reshape(channels, rank)


def unpack_lowrank(packed: Tensor, channels: int, *, down: bool) -> Tensor:
    """`lora_down` or `lora_up` -> (channels, R)."""
    rows, rank = padded(channels), packed.shape[1]
    if rank % RANK_TILE:
        raise FormatError(f"low-rank matrix: its rank {rank} is no multiple of {RANK_TILE}")
    _require("low-rank matrix", packed, (rows, rank))
    fine = packed.view(rows // 16, rank // 16, 8, 4, 2, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
    tiles = fine.reshape(rows // 16, rank // 16, 16, 16)
    tiles = tiles.transpose(2, 3) if down else tiles
    return tiles.transpose(1, 2).reshape(rows, rank)[:channels].contiguous()


def pack_w4a16_codes(codes: Tensor) -> Tensor:
    """Unsigned 4-bit codes (N, K) uint8 -> `qweight` (N/4, K/2) int32; N a multiple of 4, K of 64."""
    n, k = codes.shape
    if n % 4 or k % 64:
        raise FormatError(f"W4A16 codes: N = {n} must be a multiple of 4 and K = {k} one of 64")
    nibbles = codes.to(torch.int32).view(n // 4, 4, k // 64, 2, 4, 8).permute(0, 2, 1, 3, 5, 4)
    words = sum(nibbles[..., s] << (4 * s) for s in range(4))
    assert isinstance(words, Tensor)
    pairs = words.reshape(n // 4, k // 2, 2)
    low_high = pairs[..., 0] | (pairs[..., 1] << 16)
    return low_high.to(torch.int32)


def unpack_w4a16_codes(qweight: Tensor, n: int, k: int) -> Tensor:
    """`qweight` int32 -> unsigned codes (N, K) uint8."""
    _require("qweight", qweight, (n // 4, k // 2))
    words = qweight.view(torch.int16).view(n // 4, k // 64, 4, 2, 8)
    nibbles = torch.stack([(words >> (4 * s)) & 15 for s in range(4)], dim=-1)
    return nibbles.permute(0, 2, 1, 3, 5, 4).reshape(n, k).to(torch.uint8)


def interleave_rows(tensor: Tensor, chunks: int, dim: int) -> Tensor:
    """A modulation's rows from Diffusers' order, chunk by chunk, to the stored one, in which chunks alternate."""
    by_chunk: Tensor = tensor.unflatten(dim, (chunks, -1))
    return by_chunk.transpose(dim, dim + 1).flatten(dim, dim + 1).contiguous()


def separate_rows(tensor: Tensor, chunks: int, dim: int) -> Tensor:
    """The inverse of `interleave_rows`."""
    by_row: Tensor = tensor.unflatten(dim, (-1, chunks))
    return by_row.transpose(dim, dim + 1).flatten(dim, dim + 1).contiguous()
