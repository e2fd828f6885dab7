"""Weights expanded ahead of the product that reads them, while a CUDA graph is recorded.

Expanding is bound by bandwidth, products and attention by arithmetic, and quantizers leave half of the bandwidth. So an
expansion becomes a branch beside the main path of the graph: it waits for the product that read its buffer last, some
products before, and not for what has been computed since. Outside of graphs, where weights may be moved between two
layers (offloading), the expansion stands right before its product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tonfa.kernels.triton.scratch import SCRATCH

BUFFERS = 3


@dataclass
class _Buffer:
    memory: Tensor
    graph: int = 0
    read: torch.cuda.Event | None = None
    """While that graph is recorded: behind the last product that reads `memory`."""


class Ahead:
    """Buffers taken in turn, for each device and stream on which graphs are recorded.

    Graphs hold their addresses: buffers that have been outgrown are kept.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, int], list[_Buffer]] = {}
        self._beside: dict[torch.device, torch.cuda.Stream] = {}
        self._outgrown: list[Tensor] = []

    def _take(self, device: torch.device, stream: int, nbytes: int) -> _Buffer:
        """The one that was used longest ago."""
        buffers = self._buffers.setdefault((device, stream), [])
        if len(buffers) < BUFFERS:
            buffers.insert(0, _Buffer(torch.empty(0, dtype=torch.uint8, device=device)))
        buffer = buffers.pop(0)
        buffers.append(buffer)
        if buffer.memory.numel() < nbytes:
            self._outgrown.append(buffer.memory)
            buffer.memory = torch.empty(SCRATCH.largest(device, nbytes), dtype=torch.uint8, device=device)
        return buffer

    def run(
        self, device: torch.device, nbytes: int, expand: Callable[[Tensor], None], read: Callable[[Tensor], None]
    ) -> None:
        """`expand` writes `nbytes` bytes on a branch of the graph, `read` reads them on the current stream."""
        stream = torch.cuda.current_stream(device)
        if device not in self._beside:
            self._beside[device] = torch.cuda.Stream(device)
        beside = self._beside[device]
        buffer, graph = self._take(device, stream.cuda_stream, nbytes), recording(stream)
        if buffer.read is None or buffer.graph != graph:
            buffer.read = stream.record_event()
        beside.wait_event(buffer.read)
        with torch.cuda.stream(beside):
            expand(buffer.memory[:nbytes])
        stream.wait_event(beside.record_event())
        read(buffer.memory[:nbytes])
        buffer.graph, buffer.read = graph, stream.record_event()


def recording(stream: torch.cuda.Stream) -> int:
    """The number of the graph that is being recorded on this stream."""
    from cuda.bindings import driver

    return int(driver.cuStreamGetCaptureInfo(stream.cuda_stream)[2])


AHEAD = Ahead()
