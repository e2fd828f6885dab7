"""A CUDA graph for each shape of a forward pass: hundreds of launches cost the host the time of one.

The first call with a shape runs eagerly, which compiles kernels and settles buffers; the second records; later ones
replay. Inputs are copied into the graph's own, the output is copied out, so a replay is the eager call bit for bit.
What cannot be recorded runs eagerly, with the reason logged once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tonfa.runtime.stamp import WeightsStamp

log = logging.getLogger(__name__)

LIMIT = 4
"""Shapes that are kept recorded at a time, least recently used out first."""

_RECORDING = Lock()
"""One graph at a time: all are recorded on the same stream of PyTorch's, and on the same one beside it."""

Inputs = Mapping[str, Tensor]
Compute = Callable[[Inputs], Tensor]
_Key = tuple[tuple[str, torch.Size, torch.dtype, torch.device], ...]


class _Recorded:
    """One shape's graph with the tensors that it reads and writes."""

    def __init__(self, module: nn.Module, compute: Compute, inputs: Inputs, pool: Any) -> None:
        self._inputs = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in inputs.items()}
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._output = compute(self._inputs)
        self.stamp = WeightsStamp(module)
        self._done = torch.cuda.Event()

    def __call__(self, inputs: Inputs) -> Tensor:
        # The last replay may have been on another stream.
        torch.cuda.current_stream().wait_event(self._done)
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor, non_blocking=True)
        self._graph.replay()
        output = self._output.clone()
        self._done.record()
        return output


class Graphs:
    """Recorded forward passes of one module.

    Calls from several threads at once are computed eagerly, all but one. Copies of the module start without graphs.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.enabled = True
        self._limit = limit
        self._seen: OrderedDict[_Key, _Recorded | Literal["ran once", "refused"]] = OrderedDict()
        self._refused: set[str] = set()
        self._pool: Any = None
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Graphs], tuple[int]]:
        return Graphs, (self._limit,)

    def clear(self) -> None:
        """Forget all graphs and free their memory."""
        with self._lock:
            self._seen.clear()

    def run(self, module: nn.Module, compute: Compute, inputs: Inputs) -> Tensor:
        """compute(inputs), by replaying a graph where one can be recorded."""
        if not self.enabled or not _recordable(inputs):
            return compute(inputs)
        if not self._lock.acquire(blocking=False):
            return compute(inputs)
        try:
            return self._run(module, compute, inputs)
        finally:
            self._lock.release()

    def _run(self, module: nn.Module, compute: Compute, inputs: Inputs) -> Tensor:
        key = tuple((name, t.shape, t.dtype, t.device) for name, t in inputs.items())
        state = self._seen.pop(key, None)
        if isinstance(state, _Recorded) and not state.stamp.holds():
            state = None
        if state is None:
            state = "ran once"
        elif state == "ran once":
            state = self._record(module, compute, inputs)
        self._seen[key] = state
        while len(self._seen) > self._limit:
            self._seen.popitem(last=False)
        return state(inputs) if isinstance(state, _Recorded) else compute(inputs)

    def _record(self, module: nn.Module, compute: Compute, inputs: Inputs) -> _Recorded | Literal["refused"]:
        if any(hasattr(m, "_hf_hook") for m in module.modules() if m is not module):
            return self._refuse("offloading hooks move the weights in the middle of a step")
        if not any(isinstance(state, _Recorded) for state in self._seen.values()):
            self._pool = torch.cuda.graph_pool_handle()  # a pool goes with its last graph
        try:
            with _RECORDING:
                return _Recorded(module, compute, inputs, self._pool)
        except RuntimeError as error:
            return self._refuse(f"recording failed: {error}")

    def _refuse(self, reason: str) -> Literal["refused"]:
        if reason not in self._refused:
            self._refused.add(reason)
            log.warning("no CUDA graph, the step runs eagerly: %s", reason)
        return "refused"


def _recordable(inputs: Inputs) -> bool:
    """Whether a graph is possible here: not on the CPU, under torch.compile, within another graph, or for training."""
    return (
        all(tensor.device.type == "cuda" for tensor in inputs.values())
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs.values()))
    )
