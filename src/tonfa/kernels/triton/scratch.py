"""The buffer that weights are expanded into, shared by all layers that one thread runs on one stream.

Of two threads on the same stream each has its own: one's expansion may come between the other's and its product. It is
as large as the largest layer that was packed. A CUDA graph holds addresses: buffers that have been outgrown are kept,
so that a graph captured before stays valid.
"""

from __future__ import annotations

from threading import get_ident

import torch
from torch import Tensor


class Scratch:
    """Uninitialized bytes of a device, stream and thread; the next tensor overwrites the one before."""

    def __init__(self) -> None:
        self._largest: dict[torch.device, int] = {}
        self._buffers: dict[tuple[torch.device, int, int], Tensor] = {}
        self._outgrown: list[Tensor] = []

    def reserve(self, device: torch.device, nbytes: int) -> None:
        """Make every buffer of this device at least so large, from its next use on."""
        self._largest[device] = self.largest(device, nbytes)

    def largest(self, device: torch.device, nbytes: int) -> int:
        """Bytes that every layer fits in which was packed for this device, at least `nbytes`."""
        return max(self._largest.get(device, 0), nbytes)

    def empty(self, device: torch.device, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """(rows, columns) of an 8-bit dtype, contiguous."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = device, stream, get_ident()
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * columns:
            if buffer is not None:
                self._outgrown.append(buffer)
            self.reserve(device, rows * columns)
            buffer = torch.empty(self._largest[device], dtype=torch.uint8, device=device)
            self._buffers[key] = buffer
        return buffer[: rows * columns].view(dtype).view(rows, columns)

    def nbytes(self) -> int:
        """What is kept."""
        return sum(b.numel() for b in (*self._buffers.values(), *self._outgrown))


SCRATCH = Scratch()
