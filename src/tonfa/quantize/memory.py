"""What to do when memory runs out, said where it runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tonfa.errors import UnsupportedError

_HOST = ("can't allocate memory", "not enough memory")
"""What PyTorch's allocator of host memory says, in an ordinary RuntimeError."""


@contextmanager
def enough_memory(stage: str, remedy: str) -> Iterator[None]:
    """Turn exhausted memory of the host or the GPU into an UnsupportedError that names the stage and a remedy."""
    try:
        yield
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError)
        if not full and not any(text in str(error) for text in _HOST):
            raise
        raise UnsupportedError(f"out of {'GPU ' if full else ''}memory while {stage}; {remedy}") from error
    except MemoryError as error:
        raise UnsupportedError(f"out of memory while {stage}; {remedy}") from error
