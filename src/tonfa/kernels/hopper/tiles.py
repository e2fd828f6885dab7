"""Which tile a product takes: the one whose waves over the multiprocessors cost least."""

from __future__ import annotations

from functools import lru_cache

CHANNELS = 128
_TOKENS = (256, 240, 224, 208, 192, 176, 160, 144, 128, 96, 64, 32)
_SHARED = 232_448 - 1024
_STEP, _TOKEN = 0.16, 0.0024  # microseconds of 128 channels of a tile on an H200, the tile's end spread over 24 steps


def _stage_bytes(tokens: int) -> int:
    """Codes of x, weights, scales of the tokens."""
    return tokens * 128 + CHANNELS * 128 + 1024


def _rest_bytes(tokens: int, down_blocks: int | None) -> int:
    """A finished tile, what a fused quantization needs of the next linear, barriers."""
    following = 0 if down_blocks is None else down_blocks * 2048 + CHANNELS * 4
    return tokens * 256 + following + 256


def stages(tokens: int, down_blocks: int | None = None) -> int:
    """Steps in flight."""
    return min(8, (_SHARED - _rest_bytes(tokens, down_blocks)) // _stage_bytes(tokens))


def shared_bytes(tokens: int, down_blocks: int | None = None) -> int:
    """Shared memory of a block."""
    return 1024 + stages(tokens, down_blocks) * _stage_bytes(tokens) + _rest_bytes(tokens, down_blocks)


@lru_cache(maxsize=4096)
def choose(rows: int, columns: int, multiprocessors: int) -> int:
    """Tokens of a tile."""

    def cost(tokens: int) -> float:
        tiles = -(-rows // tokens) * -(-columns // CHANNELS)
        return -(-tiles // multiprocessors) * (_STEP + _TOKEN * tokens)

    return min(_TOKENS, key=cost)


@lru_cache(maxsize=4096)
def choose_run(rows: int, columns: int, multiprocessors: int) -> tuple[int, int]:
    """Tokens of a tile, and how many tiles of the same tokens a block takes one after another."""

    def runs(tokens: int) -> int:
        m_tiles, n_tiles = -(-rows // tokens), -(-columns // CHANNELS)
        return -(-n_tiles // max(1, multiprocessors // m_tiles))

    def cost(tokens: int) -> float:
        run = runs(tokens)
        units = -(-rows // tokens) * -(-columns // (CHANNELS * run))
        return -(-units // multiprocessors) * run * (_STEP + _TOKEN * tokens)

    tokens = min(_TOKENS, key=cost)
    return tokens, runs(tokens)
