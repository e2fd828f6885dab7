"""What configurations ask of a device."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many blocks of a kernel run at a time, at least."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
