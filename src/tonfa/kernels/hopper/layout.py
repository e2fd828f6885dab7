"""The layouts that this backend's kernels exchange, as their quantizer writes them; in plain PyTorch for tests.

Rows of 128 bytes are stored tile by tile, (tiles, rows, 128), rows padded to a multiple of 8; piece c (16 bytes) of
row m lies at place c XOR (m mod 8), the 128-byte swizzle of wgmma's shared memory operands, so one plain copy brings
any run of rows. Codes have their 128 channels in the order in which the product decodes weights: byte 32 s + 16 h +
4 q + i is channel 32 q + 8 s + 4 h + i, so a thread's 16 bytes of 4-bit codes become four bytes of each piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROW_BYTES = 128
ROW_MULTIPLE = 8


def channel_of_byte() -> Tensor:
    """(128,): the channel within a tile that each byte of a row holds."""
    byte = torch.arange(ROW_BYTES)
    s, h, q, i = byte // 32, byte // 16 % 2, byte // 4 % 4, byte % 4
    return 32 * q + 8 * s + 4 * h + i


def swizzle(tiles: Tensor) -> Tensor:
    """(T, M, 128) uint8 -> the same with the pieces of each row exchanged; its own inverse."""
    t, m, _ = tiles.shape
    place = torch.arange(8, device=tiles.device) ^ (torch.arange(m, device=tiles.device) % 8).unsqueeze(1)
    pieces = tiles.view(t, m, 8, 16)
    return torch.gather(pieces, 2, place[None, :, :, None].expand(pieces.shape)).view(t, m, ROW_BYTES)


def unpack_codes(stored: Tensor, rows: int, channels: int) -> Tensor:
    """(K/128, M padded, 128) bytes -> codes (M, K) e4m3."""
    order = torch.argsort(channel_of_byte()).to(stored.device)
    codes = swizzle(stored.view(torch.uint8))[:, :, order].permute(1, 0, 2).flatten(1)
    return codes[:rows, :channels].contiguous().view(torch.float8_e4m3fn)


def pack_codes(codes: Tensor) -> Tensor:
    """The inverse of `unpack_codes`, zeros in the padding."""
    rows, channels = codes.shape
    padded_rows, tiles = -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE, -(-channels // ROW_BYTES)
    whole = torch.zeros(padded_rows, tiles * ROW_BYTES, dtype=torch.uint8, device=codes.device)
    whole[:rows, :channels] = codes.view(torch.uint8)
    ordered = whole.view(padded_rows, tiles, ROW_BYTES)[:, :, channel_of_byte().to(codes.device)]
    return swizzle(ordered.permute(1, 0, 2).contiguous())


def unpack_lowrank(stored: Tensor, rows: int, rank: int) -> Tensor:
    """(R/64, M padded, 64) bf16 -> (M, R) bf16."""
    tiles = stored.shape[0]
    plain = swizzle(stored.view(torch.uint8).view(tiles, -1, ROW_BYTES)).view(torch.bfloat16)
    return plain.permute(1, 0, 2).flatten(1)[:rows, :rank]


def pack_up(proj_up: Tensor) -> Tensor:
    """(N, R) bf16 -> (N/128, R/16, 256, 8): the A fragments of m64k16 wgmma of two warpgroups, 16 bytes a thread."""
    n, rank = proj_up.shape
    tiles, steps = -(-n // 128), -(-rank // 16)
    whole = proj_up.new_zeros(tiles * 128, steps * 16)
    whole[:n, :rank] = proj_up
    # n: tile, warpgroup, warp, upper or lower half of 16 rows, row; r: step, half of 16, quad, pair
    split = whole.view(tiles, 2, 4, 2, 8, steps, 2, 4, 2)
    return split.permute(0, 5, 1, 2, 4, 7, 6, 3, 8).reshape(tiles, steps, 256, 8).contiguous()


def pack_down(down: Tensor) -> Tensor:
    """(R, K) 16-bit -> (K/64, R, 128) bytes, swizzled."""
    rank, k = down.shape
    tiles = down.view(rank, k // 64, 64).permute(1, 0, 2).contiguous()
    return swizzle(tiles.view(torch.uint8))
