"""cuDNN's FP8 attention (`sdpa_fp8` of nvidia-cudnn-frontend 1.32): a plan for each shape, built once.

On Hopper it reads and writes e4m3 alone: a result in 16 bits is refused there. It takes one factor for each tensor.
Shapes that cuDNN has no plan for raise UnsupportedError with all that it says, and are remembered. A plan is a kernel
that cuDNN compiles through NVRTC, so an unsuitable libnvrtc or driver fails here, too, with "no plan in the list could
be built"; `benchmarks/attention_fp8.py --diagnose` tells these apart.

A plan is run on torch's current stream with memory of torch's allocator, so it can be recorded in a CUDA graph, once it
has been built by a call outside of one: building waits for a compiler. A plan's code is unloaded with it, so one that a
CUDA graph has recorded is never dropped, another one when it has run.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import cudnn
import torch
from torch import Tensor

from tonfa.errors import UnsupportedError
from tonfa.ops.attention_fp8 import SCALARS, QuantizedHeads

LIMIT = 32
"""Plans that are kept beside those that graphs hold, least recently used out first."""

_Key = tuple[torch.Size, torch.device]


class Plan:
    """`sdpa_fp8` for one shape on one device."""

    def __init__(self, shape: torch.Size, handle: Any) -> None:
        _, heads, length, size = shape
        graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.FP8_E4M3,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle,
        )

        strides = (length * heads * size, size, heads * size, 1)

        def operand(name: str) -> Any:
            return graph.tensor(dim=tuple(shape), stride=strides, data_type=cudnn.data_type.FP8_E4M3, name=name)

        def scalar(name: str) -> Any:
            one = (1, 1, 1, 1)
            return graph.tensor(dim=one, stride=one, data_type=cudnn.data_type.FLOAT, name=name)

        inputs = [*map(operand, "qkv"), *map(scalar, SCALARS[:6])]
        out, _, *amax = graph.sdpa_fp8(*inputs, generate_stats=False, attn_scale=size**-0.5)
        out.set_output(True).set_dim(tuple(shape)).set_stride(strides).set_data_type(cudnn.data_type.FP8_E4M3)
        for tensor in amax:  # written whether wanted or not
            tensor.set_output(True).set_dim((1, 1, 1, 1)).set_stride((1, 1, 1, 1))
            tensor.set_data_type(cudnn.data_type.FLOAT)
        graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])

        self._graph = graph
        self._uids = [tensor.get_uid() for tensor in (*inputs, *amax, out)]
        self._workspace = max(1, graph.get_workspace_size())
        self._runs: dict[int, torch.cuda.Event] = {}  # behind the last one on each stream
        self.recorded = False
        """Whether a CUDA graph may hold it."""

    def run(self, x: QuantizedHeads, handle: Any) -> Tensor:
        """(B, L, H, D) e4m3 in units of x.descale."""
        batch, heads, length, size = x.q.shape
        out = torch.empty((batch, length, heads, size), dtype=x.q.dtype, device=x.q.device)
        workspace = torch.empty(self._workspace, dtype=torch.uint8, device=x.q.device)
        buffers = (x.q, x.k, x.v, *x.scalars.unbind(), out)
        self._graph.execute(dict(zip(self._uids, buffers, strict=True)), workspace, handle=handle)
        if not self.recorded:
            stream = torch.cuda.current_stream(x.q.device)
            self._runs.setdefault(stream.cuda_stream, torch.cuda.Event()).record(stream)
        return out

    def wait(self) -> None:
        """Until no stream runs it. Not for the device, which would break graphs that other threads are recording."""
        for run in self._runs.values():
            run.synchronize()


_plans: OrderedDict[_Key, Plan | str] = OrderedDict()
"""A string says why cuDNN refused."""
_lock = threading.Lock()


class _Handles(threading.local):
    """A thread's cuDNN handles: two threads must not use one."""

    def __init__(self) -> None:
        self.by_device: dict[torch.device, Any] = {}


_handles = _Handles()


def _handle(device: torch.device) -> Any:
    """This thread's cuDNN handle on the current device, set to torch's current stream."""
    handles = _handles.by_device
    handle = handles.get(device)
    if handle is None:
        handle = handles[device] = cudnn.create_handle()
    cudnn.set_stream(handle, torch.cuda.current_stream(device).cuda_stream)
    return handle


def _make_room() -> None:
    """For one more plan."""
    droppable = [key for key, plan in _plans.items() if isinstance(plan, str) or not plan.recorded]
    for key in droppable[: max(0, len(droppable) - LIMIT + 1)]:
        plan = _plans.pop(key)
        if isinstance(plan, Plan):
            plan.wait()


def _plan(key: _Key, handle: Any, recording: bool) -> Plan:
    plan = _plans.pop(key, None)
    if plan is None:
        if recording:
            raise RuntimeError(f"attention of shape {tuple(key[0])} must run once before it is recorded")
        _make_room()
        try:
            plan = Plan(key[0], handle)
        except (cudnn.cudnnGraphNotSupportedError, RuntimeError) as error:
            plan = f"{type(error).__name__}: {error}"
    _plans[key] = plan
    if isinstance(plan, str):
        raise UnsupportedError(
            f"cuDNN {cudnn.backend_version()} has no FP8 attention for shape {tuple(key[0])}: {plan}"
        )
    plan.recorded |= recording
    return plan


def check(shape: torch.Size, device: torch.device) -> None:
    """Build what runs q, k and v of this shape (B, H, L, D), unless that is done. Raises as `attend` does."""
    with torch.cuda.device(device), _lock:
        _plan((shape, device), _handle(device), torch.cuda.is_current_stream_capturing())


def attend(x: QuantizedHeads) -> Tensor:
    """softmax(q k^T / sqrt(D)) v: (B, L, H, D) e4m3, to be multiplied with x.descale.

    Raises UnsupportedError where cuDNN cannot, and RuntimeError if a CUDA graph records a shape that has not run yet.
    """
    device = x.q.device
    with torch.cuda.device(device), _lock:
        handle = _handle(device)
        plan = _plan((x.q.shape, device), handle, torch.cuda.is_current_stream_capturing())
        return plan.run(x, handle)
