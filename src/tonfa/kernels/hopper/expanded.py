"""A layer's weights in e4m3 for the product that follows: kept so, or expanded right before it.

All layers expand into one buffer, which L2 is asked to keep: the next layer overwrites what need not go to memory.
Behind a kernel that does not read the buffer, that is done while it runs: it waited for the product in front of it, so
nobody reads the buffer any more.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tonfa.kernels.cuda.launch import latest
from tonfa.kernels.hopper.expand import expand, wide_shape
from tonfa.kernels.hopper.packed_product import PackedProduct
from tonfa.kernels.triton.scratch import SCRATCH

_NO_READERS = ("quantize", "quantize_known", "add_lowrank", "attention_center")
"""Kernels that have nothing to do with expanded weights, and let the next one start when they have waited."""

_written: dict[tuple[torch.device, int], int] = {}
"""Of a device and stream: where the weights were expanded to last."""

_recorded: dict[tuple[torch.device, int], tuple[int, Tensor]] = {}
"""Of a device and stream: the graph that was recorded last, and its buffer."""


def expanded(w: PackedProduct, device: torch.device) -> Tensor:
    """(K/128, N, 128) bytes; valid on the current stream until the next call."""
    if w.wide is not None:
        return w.wide
    shape = wide_shape(w.columns, w.in_features)
    out = _buffer(device, math.prod(shape)).view(shape)
    stream, kernel_in_front = latest(device)
    used_before = (
        _written.get((device, stream)) == out.data_ptr()
    )  # else it may be memory that the kernel in front reads
    _written[device, stream] = out.data_ptr()
    expand(w.qweight, w.wscales, w.inverse_scales, out, used_before and kernel_in_front in _NO_READERS)
    return out


def _buffer(device: torch.device, nbytes: int) -> Tensor:
    """In a graph's own memory while one is recorded: graphs that run at the same time do not share it."""
    if not torch.cuda.is_current_stream_capturing():
        return SCRATCH.empty(device, nbytes, 1, torch.uint8).flatten()
    stream = torch.cuda.current_stream(device).cuda_stream
    graph = _graph_on(stream)
    known, buffer = _recorded.get((device, stream), (None, None))
    if buffer is None or known != graph or buffer.numel() < nbytes:
        buffer = torch.empty(SCRATCH.largest(device, nbytes), dtype=torch.uint8, device=device)
        _recorded[device, stream] = graph, buffer
    return buffer[:nbytes]


def _graph_on(stream: int) -> int:
    """The number of the graph that is being recorded on this stream."""
    from cuda.bindings import driver

    return int(driver.cuStreamGetCaptureInfo(stream)[2])
