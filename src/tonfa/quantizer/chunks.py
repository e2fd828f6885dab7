"""Row chunks, so that the temporaries of elementwise searches stay in a CPU's cache and off a GPU's memory limit."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CPU_CHUNK = 1 << 18
"""Weights a chunk."""
GPU_CHUNK = 1 << 25


def row_chunks(matrix: Tensor) -> Iterator[slice]:
    """Slices that cut a matrix (N, K) into chunks of whole rows."""
    n, k = matrix.shape
    rows = max(1, (CPU_CHUNK if matrix.device.type == "cpu" else GPU_CHUNK) // k)
    for start in range(0, n, rows):
        yield slice(start, start + rows)
