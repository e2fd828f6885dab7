"""Which tile a product takes: a pure function of the GPU and the shape. Nothing is timed in a user's run.

A tile of BLOCK_M x BLOCK_N outputs keeps one multiprocessor busy for as long as it has products, divided by how well
its size feeds the tensor cores; the tiles of a product run in waves of one for each multiprocessor. `choose` takes the
candidate with the shortest sum of waves; `MEASURED` overrides it where a measurement says otherwise.

Waves on 132 multiprocessors, 128 x 256 | 128 x 128 tiles, and the part of them that is full:
4608 rows: N = 3072 4 (82 %) | 7 (94 %), N = 9216 10 (98 %) | 20 (98 %), N = 12288 14 (94 %) | 27 (97 %);
4096 rows: N = 3072 3 (97 %) | 6 (97 %), N = 9216 9 (97 %) | 18 (97 %), N = 12288 12 (97 %) | 24 (97 %);
512 rows: N = 3072 1 (36 %) | 1 (73 %), N = 9216 2 (55 %) | 3 (73 %), N = 12288 2 (73 %) | 3 (97 %).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """How a product is cut up, and what the compiler is told."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    """Row tiles that are computed column by column, so that they find the weights in L2."""


@dataclass(frozen=True)
class Candidate:
    """A tile and the part of the peak rate that one multiprocessor reaches with it."""

    tile: Tile
    efficiency: float


_HOPPER = (
    Candidate(Tile(128, 256, 128, 8, 3), 1.0),
    Candidate(Tile(128, 128, 128, 8, 5), 0.9),
    Candidate(Tile(64, 128, 128, 4, 6), 0.65),
    Candidate(Tile(64, 64, 128, 4, 8), 0.4),
)
_AMPERE = (
    Candidate(Tile(128, 128, 128, 8, 3), 1.0),
    Candidate(Tile(64, 128, 128, 4, 3), 0.8),
    Candidate(Tile(64, 64, 128, 4, 4), 0.6),
)
_SMALL_SHARED_MEMORY = (
    Candidate(Tile(128, 128, 64, 8, 3), 1.0),
    Candidate(Tile(64, 128, 64, 4, 4), 0.8),
    Candidate(Tile(64, 64, 64, 4, 5), 0.6),
)

CANDIDATES: dict[tuple[int, int], tuple[Candidate, ...]] = {
    (8, 0): _AMPERE,
    (8, 6): _SMALL_SHARED_MEMORY,
    (8, 9): _SMALL_SHARED_MEMORY,
    (9, 0): _HOPPER,
    (10, 0): _HOPPER,
    (12, 0): _SMALL_SHARED_MEMORY,
}
"""By compute capability; another one takes the nearest below. Shared memory: 8.0 163 KB, 9.0 and 10.0 227, else 99."""

MEASURED: dict[tuple[tuple[int, int], int, int, int], Tile] = {}
"""(compute capability, M rounded up to 512, N, K) -> the tile that was fastest (benchmarks/kernels.py --tune)."""


def candidates(capability: tuple[int, int]) -> tuple[Candidate, ...]:
    """The tiles to choose from on this GPU."""
    return CANDIDATES[max((c for c in CANDIDATES if c <= capability), default=(8, 0))]


@lru_cache(maxsize=1024)
def choose(
    capability: tuple[int, int],
    multiprocessors: int,
    m: int,
    n: int,
    k: int,
    multiple: int = 1,  # what the width has to be a multiple of
) -> Tile:
    """The tile for (M, K) x (N, K)^T on a GPU with this many multiprocessors."""
    measured = MEASURED.get((capability, -(-m // 512) * 512, n, k))
    if measured is not None:
        return measured

    def time(candidate: Candidate) -> float:
        tile = candidate.tile
        waves = -(-(-(-m // tile.block_m) * -(-n // tile.block_n)) // multiprocessors)
        return waves * tile.block_m * tile.block_n / candidate.efficiency

    fitting = [c for c in candidates(capability) if c.tile.block_n % multiple == 0]
    tile = min(fitting, key=time).tile
    block_k = tile.block_k
    while k % block_k:
        block_k //= 2
    return tile if block_k == tile.block_k else replace(tile, block_k=block_k)


@lru_cache(maxsize=16)
def processors(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors. Where kernels are interpreted, a Hopper of two."""
    if device.type != "cuda":
        return (9, 0), 2
    return torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count
