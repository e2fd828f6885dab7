"""How many threads small matrices are worth.

A solver is tens of thousands of short operations. OpenMP splits each, and all wait for the slowest: where another
process keeps one of two cores busy, that is a time slice of the kernel's for each of them. Measured on two cores, one
calibrated linear of 768 x 256: 0.32 s in one thread; in two 0.24 s, or 1.5 s beside one busy process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 1 << 18
"""Weights up to which one thread solves."""


@contextmanager
def suited_threads(weights: int) -> Iterator[None]:
    """Solve for so many weights in one thread if they are few, else in as many as PyTorch has been given."""
    before = torch.get_num_threads()
    if weights > SMALL or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
