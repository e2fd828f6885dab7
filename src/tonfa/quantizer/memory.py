"""What to do when memory runs out, said where it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tonfa.errors import UnsupportedError

MEMINFO = Path("/proc/meminfo")
"""Linux's table of memory; other systems have none."""
_HOST = ("can't allocate memory", "not enough memory")
"""What PyTorch's allocator of host memory says, in an ordinary RuntimeError."""


@contextmanager
def enough_memory(stage: str, remedy: str, gpu_remedy: str | None = None) -> Iterator[None]:
    """Turn exhausted memory of the host or the GPU into an UnsupportedError that names the stage and its remedy.

    `gpu_remedy` is for the GPU's memory where what helps there does not help the host.
    """
    try:
        yield
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError)
        if not full and not any(text in str(error) for text in _HOST):
            raise
        if full:
            raise UnsupportedError(f"out of GPU memory while {stage}; {gpu_remedy or remedy}") from error
        raise UnsupportedError(f"out of memory while {stage}; {remedy}") from error
    except MemoryError as error:
        raise UnsupportedError(f"out of memory while {stage}; {remedy}") from error


def check_host_memory(needed: int, what: str, remedy: str) -> None:
    """Raise UnsupportedError if `needed` bytes are more than Linux says are available: it would end the process."""
    if not MEMINFO.is_file():
        return
    for line in MEMINFO.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and needed > (free := int(value.split()[0]) * 1024):
            raise UnsupportedError(
                f"{what} take {needed / 1e9:.1f} GB of the host's memory and {free / 1e9:.1f} GB are free; {remedy}"
            )
