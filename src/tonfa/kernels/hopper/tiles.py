"""Which tile a product takes: the one whose waves over the multiprocessors cost least."""

from __future__ import annotations

from functools import lru_cache

CHANNELS = 128
_TOKENS = (256, 240, 224, 208, 192, 176, 160, 144, 128, 96, 64, 32)
_SHARED = 232_448 - 1024
_STEP, _TOKEN = 0.52, 0.00175  # microseconds of 128 channels of a tile on an H200: 0.78 at 128 tokens, 0.97 at 256


def part(tokens: int) -> int:
    """Tokens that the epilogue stages at a time."""
    return (tokens // 8 + 1) // 2 * 8


def stages(tokens: int) -> int:
    """Steps in flight."""
    staged = 2 * part(tokens) * 128 + 4 * 2 * tokens + 256
    return min(8, (_SHARED - staged) // stage_bytes(tokens))


def stage_bytes(tokens: int) -> int:
    """Codes of x, 4-bit codes of w, tables."""
    return tokens * 128 + CHANNELS * 64 + 2 * CHANNELS * 16


def shared_bytes(tokens: int) -> int:
    """Shared memory of a block."""
    count = stages(tokens)
    return 1024 + count * stage_bytes(tokens) + 2 * part(tokens) * 128 + 2 * tokens * 4 + 16 * count


@lru_cache(maxsize=4096)
def choose(rows: int, columns: int, multiprocessors: int) -> int:
    """Tokens of a tile."""

    def cost(tokens: int) -> float:
        tiles = -(-rows // tokens) * -(-columns // CHANNELS)
        return -(-tiles // multiprocessors) * (_STEP + _TOKEN * tokens)

    return min(_TOKENS, key=cost)
