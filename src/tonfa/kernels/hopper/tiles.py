"""Which tile a product takes: the one whose waves over the multiprocessors cost least."""

from __future__ import annotations

from functools import lru_cache

CHANNELS = 128
CLUSTER = 2
"""Blocks that load the codes of their common tokens together, where tiles can be divided so; 1: each block alone."""
TOKENS = (256, 240, 224, 208, 192, 176, 160, 144, 128, 112, 96, 64, 32)
_SHARED = 232_448 - 1024
_MANY_FINISHERS = 192  # tokens of the largest tile that leaves registers for seven warps
_KEPT_RANK = 32  # of a down-projection whose sums fit beside those of the largest such tile
_SLOT_ROW = 0.0001  # microseconds: adding up a row's sums of another block
# Microseconds on an H200 whose products run at its power limit all the time (benchmarks/hopper_tiles.py).
_STEP, _STEP_TOKEN = 0.112, 0.0028  # of 128 channels of a tile, and of each of its tokens
_END, _END_LARGEST = 0.0065, 0.0095  # of a token at the tile's end, with seven warps and with three
_STEP_LARGEST = 1.07  # times a step, where three warps finish instead of seven


def _stage_bytes(tokens: int) -> int:
    """Codes of x, weights, a place for a tile's scales."""
    return tokens * 128 + CHANNELS * 128 + tokens * 4


def _rest_bytes(tokens: int, down_rank: int | None) -> int:
    """A finished tile and its scales, what a fused quantization needs of the next linear, barriers."""
    following = 0 if down_rank is None else down_rank * CHANNELS * 2 + CHANNELS * 4
    return tokens * 256 + tokens * 4 + following + 256


def stages(tokens: int, down_rank: int | None = None) -> int:
    """Steps in flight."""
    return min(8, (_SHARED - _rest_bytes(tokens, down_rank)) // _stage_bytes(tokens))


def shared_bytes(tokens: int, down_rank: int | None = None) -> int:
    """Shared memory of a block."""
    return 1024 + stages(tokens, down_rank) * _stage_bytes(tokens) + _rest_bytes(tokens, down_rank)


def threads(tokens: int) -> int:
    """Of a block: registers decide how many warps finish tiles beside those that multiply."""
    return 384 if tokens > _MANY_FINISHERS else 512


def cluster(columns: int, multiprocessors: int, run: int = 1) -> int:
    """Blocks of a cluster: CLUSTER where tiles, in runs, and multiprocessors go into so many equal parts, or one."""
    n_tiles = -(-columns // CHANNELS)
    return CLUSTER if n_tiles % (CLUSTER * run) == 0 and multiprocessors % CLUSTER == 0 else 1


def _cost(tokens: int, tiles: int, steps: int, multiprocessors: int) -> float:
    """Microseconds."""
    step, end = _STEP + _STEP_TOKEN * tokens, _END * tokens
    if tokens > _MANY_FINISHERS:
        step, end = step * _STEP_LARGEST, _END_LARGEST * tokens
    return -(-tiles // multiprocessors) * (steps * step + end)


@lru_cache(maxsize=4096)
def choose(rows: int, columns: int, channels: int, multiprocessors: int, much_to_finish: bool = False) -> int:
    """Tokens of a tile; not the largest where three warps cannot finish one while the next is multiplied."""
    n_tiles, steps = -(-columns // CHANNELS), -(-channels // CHANNELS)
    largest = _MANY_FINISHERS if much_to_finish else TOKENS[0]
    sizes = [tokens for tokens in TOKENS if tokens <= largest]
    return min(sizes, key=lambda tokens: _cost(tokens, -(-rows // tokens) * n_tiles, steps, multiprocessors))


@lru_cache(maxsize=4096)
def choose_run(
    rows: int, columns: int, channels: int, multiprocessors: int, rank: int, cluster: int = 1
) -> tuple[int, int]:
    """Tokens of a tile, and how many of the same tokens a block takes one after another: they share their sums.

    In a cluster all blocks take runs of the same length.
    """
    n_tiles, steps = -(-columns // CHANNELS), -(-channels // CHANNELS)

    def cost(choice: tuple[int, int]) -> float:
        tokens, run = choice
        slots = -(-n_tiles // run)
        return run * _cost(tokens, -(-rows // tokens) * slots, steps, multiprocessors) + _SLOT_ROW * rows * slots

    largest = _MANY_FINISHERS if rank <= _KEPT_RANK else 128  # registers for the sums
    sizes = [tokens for tokens in TOKENS if tokens <= largest and tokens % 64 == 0]
    runs = [run for run in range(1, n_tiles + 1) if cluster == 1 or n_tiles % (cluster * run) == 0]
    return min(((tokens, run) for tokens in sizes for run in runs), key=cost)
