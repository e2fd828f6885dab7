"""Every tile for the products of a FLUX step on a Hopper GPU: what kernels/hopper/tiles.py foretells, beside the clock.

    python benchmarks/hopper_tiles.py [--rows 4608 512]

A tile is tokens x 128 channels; behind a GELU a block takes `run` tiles of the same tokens. Prints microseconds, the
fastest first, and marks the tile that the library chooses; records nothing. Weights are expanded before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from kernels import CUDA, HIDDEN, PRODUCTS, captured, hopper_epilogue, outlier_input, per_call, random_layer
from tonfa.bench.protocol import interleaved
from tonfa.kernels.hopper import tiles
from tonfa.kernels.hopper.inputs import pack_input
from tonfa.kernels.hopper.packed_product import pack_product_expanded
from tonfa.kernels.hopper.quantize import quantize
from tonfa.ops.activation import InputWeights

Tile = tuple[int, int]
"""Tokens and run."""


def candidates(rows: int, columns: int, multiprocessors: int) -> list[Tile]:
    """All tiles; behind a GELU those that leave less than a quarter of the multiprocessors idle."""
    if columns != 4 * HIDDEN:
        return [(tokens, 1) for tokens in tiles.TOKENS]
    n_tiles = columns // tiles.CHANNELS
    found = []
    for tokens in (192, 128, 64):
        for run in range(1, n_tiles + 1):
            units = -(-rows // tokens) * (n_tiles // run)
            taken = -(-units // multiprocessors) * multiprocessors * run * tokens
            if n_tiles % (tiles.CLUSTER * run) == 0 and taken < 1.25 * rows * n_tiles:
                found.append((tokens, run))
    return found


def with_tile(tile: Tile, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call, whatever the library would choose."""

    def run() -> Any:
        one = mock.patch.object(tiles, "choose", lambda *_: tile[0])
        with one, mock.patch.object(tiles, "choose_run", lambda *_: tile):
            return call()

    return run


def chosen(rows: int, columns: int, channels: int, multiprocessors: int) -> Tile:
    """By the library."""
    if columns == 4 * HIDDEN:
        return tiles.choose_run(rows, columns, channels, multiprocessors, 32, tiles.CLUSTER)
    return tiles.choose(rows, columns, channels, multiprocessors, columns == 3 * HIDDEN), 1


def measure(rows: int, columns: int, channels: int, runs: int) -> None:
    """Print one product's tiles."""
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    w = random_layer(columns, channels)
    packed = pack_product_expanded(w)
    quantizer = pack_input(InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "fp8"))
    inputs = [quantize(outlier_input(rows, channels), quantizer) for _ in range(2)]
    op, calls = hopper_epilogue(inputs, packed, rows, columns)
    graphs = {
        f"{tile[0]} x {tile[1]}": [captured([with_tile(tile, call) for call in calls])]
        for tile in candidates(rows, columns, multiprocessors)
    }
    timings = {name: per_call(timing) for name, timing in interleaved(graphs, runs, CUDA).items()}
    own = "{} x {}".format(*chosen(rows, columns, channels, multiprocessors))
    found = sorted(timings, key=lambda name: timings[name].median)
    text = "  ".join(f"{name}{'*' if name == own else ''}: {timings[name].median * 1e3:.1f}" for name in found)
    print(f"{op} {rows} x {columns} x {channels}: {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=sorted({m for m, _, _ in PRODUCTS}), help="of the input")
    parser.add_argument("--runs", type=int, default=12)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        for rows in arguments.rows:
            for columns, channels in dict.fromkeys((n, k) for _, n, k in PRODUCTS):
                measure(rows, columns, channels, arguments.runs)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
