"""Weights expanded ahead of the product that reads them, while a CUDA graph is recorded.

Expanding is bound by bandwidth, products and attention by arithmetic, and quantizers leave half of the bandwidth. So an
expansion becomes a branch beside the main path of the graph: it waits for the product that read its buffer last, some
products before, and not for what has been computed since. Outside of graphs, where weights may be moved between two
layers (offloading), the expansion stands right before its product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tonfa.kernels.triton.scratch import SCRATCH

BUFFERS = 3


@dataclass
class _Buffer:
    memory: Tensor
    read: torch.cuda.Event | None = None
    """Behind the last product that reads `memory`."""


@dataclass
class _Turns:
    graph: int = 0
    buffers: list[_Buffer] = field(default_factory=list)


class Ahead:
    """Buffers of the graph that is being recorded, taken in turn, for each device and stream.

    They are in the graph's own memory, which it keeps: graphs that run at the same time do not share them.
    """

    def __init__(self) -> None:
        self._turns: dict[tuple[torch.device, int], _Turns] = {}
        self._beside: dict[torch.device, torch.cuda.Stream] = {}

    def _take(self, device: torch.device, stream: int, graph: int, nbytes: int) -> _Buffer:
        """The one that was used longest ago."""
        turns = self._turns.setdefault((device, stream), _Turns())
        if turns.graph != graph:
            turns.graph, turns.buffers = graph, []
        full = len(turns.buffers) == BUFFERS
        buffer = turns.buffers.pop(0) if full else None
        if buffer is None or buffer.memory.numel() < nbytes:
            buffer = _Buffer(torch.empty(SCRATCH.largest(device, nbytes), dtype=torch.uint8, device=device))
        turns.buffers.append(buffer)
        return buffer

    def run(
        self, device: torch.device, nbytes: int, expand: Callable[[Tensor], None], read: Callable[[Tensor], None]
    ) -> None:
        """`expand` writes `nbytes` bytes on a branch of the graph, `read` reads them on the current stream."""
        stream = torch.cuda.current_stream(device)
        if device not in self._beside:
            self._beside[device] = torch.cuda.Stream(device)
        beside = self._beside[device]
        buffer = self._take(device, stream.cuda_stream, recording(stream), nbytes)
        beside.wait_event(buffer.read or stream.record_event())
        with torch.cuda.stream(beside):
            expand(buffer.memory[:nbytes])
        stream.wait_event(beside.record_event())
        read(buffer.memory[:nbytes])
        buffer.read = stream.record_event()


def recording(stream: torch.cuda.Stream) -> int:
    """The number of the graph that is being recorded on this stream."""
    from cuda.bindings import driver

    return int(driver.cuStreamGetCaptureInfo(stream.cuda_stream)[2])


AHEAD = Ahead()
