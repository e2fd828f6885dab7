"""Which graphs of FP8 attention cuDNN builds on this machine, and what it says of those that it does not.

Every variant differs from the one that tonfa runs in one thing, and is built by a graph of its own; a 16-bit graph
shows whether cuDNN can build anything through its frontend. After a failure come the frontend's whole message and what
cuDNN itself logged meanwhile.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("libcudnn", "libnvrtc", "libcudart", "libcuda.", "_compiled_module")
RUNS = 30
Strides = tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """A graph; the defaults are what tonfa runs."""

    name: str
    shape: tuple[int, ...] = (1, 24, 4608, 128)
    operands: str = "BLHD"
    result: str = "BLHD"
    stats: bool = False
    amax: bool = True
    modes: str = "A FALLBACK"
    eight_bit: bool = True
    by_properties: bool = False
    """Planned for the device's properties instead of a handle."""


BASE = Variant("as tonfa runs it")
VARIANTS = (
    replace(BASE, name="16-bit, as a control", eight_bit=False),
    BASE,
    replace(BASE, name="operands in BHLD", operands="BHLD"),
    replace(BASE, name="all in BHLD", operands="BHLD", result="BHLD"),
    replace(BASE, name="with stats", stats=True),
    replace(BASE, name="without the maxima", amax=False),
    replace(BASE, name="heuristics A alone", modes="A"),
    replace(BASE, name="heuristics B alone", modes="B"),
    replace(BASE, name="fallback alone", modes="FALLBACK"),
    replace(BASE, name="by device properties", by_properties=True),
    replace(BASE, name="4685 tokens", shape=(1, 24, 4685, 128)),
    replace(BASE, name="320 tokens, 2 heads", shape=(1, 2, 320, 128)),
    replace(BASE, name="a batch of 2", shape=(2, 24, 1536, 128)),
    replace(BASE, name="heads of 64", shape=(1, 24, 4608, 64)),
)


def with_log() -> Path:
    """Where cuDNN logs its warnings and errors; starts this program anew if it was not told to yet."""
    if "CUDNN_LOGDEST_DBG" not in os.environ:
        handle, path = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        told = {**os.environ, "CUDNN_LOGLEVEL_DBG": "2", "CUDNN_LOGDEST_DBG": path}
        os.execve(sys.executable, [sys.executable, *sys.argv], told)
    return Path(os.environ["CUDNN_LOGDEST_DBG"])


def libraries() -> None:
    """The files of the libraries that take part, as loaded."""
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
    for file in sorted(f for f in files if any(name in Path(f).name for name in LIBRARIES)):
        print(f"  loaded {file}")


def _strides(shape: tuple[int, ...], order: str) -> Strides:
    _, heads, length, size = shape
    outer = heads * length * size
    return (outer, size, heads * size, 1) if order == "BLHD" else (outer, length * size, size, 1)


def _graph(variant: Variant, handle: Any) -> tuple[Any, list[Any], list[Any]]:
    """The graph before it is built, its inputs and its outputs."""
    import cudnn

    types = cudnn.data_type
    place: dict[str, Any] = {"handle": handle}
    if variant.by_properties:
        place = {"device_property": cudnn.create_device_properties(torch.cuda.current_device())}
    io = types.FP8_E4M3 if variant.eight_bit else types.BFLOAT16
    graph = cudnn.pygraph(io_data_type=io, intermediate_data_type=types.FLOAT, compute_data_type=types.FLOAT, **place)
    one, shape = (1, 1, 1, 1), variant.shape
    strides = _strides(shape, variant.operands)
    inputs = [graph.tensor(dim=shape, stride=strides, data_type=io, name=name) for name in "qkv"]
    options = {"generate_stats": variant.stats, "attn_scale": shape[-1] ** -0.5}
    if variant.eight_bit:
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        inputs += [graph.tensor(dim=one, stride=one, data_type=types.FLOAT, name=name) for name in names]
        out, stats, *amax = graph.sdpa_fp8(*inputs, **options)
    else:
        (out, stats), amax = graph.sdpa(*inputs, **options), []
    out.set_output(True).set_dim(shape).set_stride(_strides(shape, variant.result)).set_data_type(io)
    outputs = [out]
    if variant.stats:
        rows = (*shape[:3], 1)
        stats.set_output(True).set_dim(rows).set_stride((shape[1] * shape[2], shape[2], 1, 1))
        outputs.append(stats.set_data_type(types.FLOAT))
    if variant.amax:
        for tensor in amax:
            outputs.append(tensor.set_output(True).set_dim(one).set_stride(one).set_data_type(types.FLOAT))
    return graph, inputs, outputs


def _call(variant: Variant, graph: Any, inputs: list[Any], outputs: list[Any], handle: Any) -> Callable[[], None]:
    """A call of the graph, on buffers of its own."""
    data_type = torch.float8_e4m3fn if variant.eight_bit else torch.bfloat16

    # An input or output is an operand, statistics of the rows, or one number.
    def buffer(tensor: Any) -> torch.Tensor:
        dims = tuple(tensor.get_dim())
        if dims == variant.shape:
            order = variant.result if tensor is outputs[0] else variant.operands
            values = torch.randn(dims, device="cuda").to(data_type)
            return torch.empty_strided(dims, _strides(dims, order), dtype=data_type, device="cuda").copy_(values)
        return torch.ones(dims, device="cuda")

    buffers = {tensor.get_uid(): buffer(tensor) for tensor in (*inputs, *outputs)}
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device="cuda")
    return lambda: graph.execute(buffers, workspace, handle=handle)


def _microseconds(call: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for run in range(RUNS + 5):
        if run == 5:
            begin.record()
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) * 1e3 / RUNS


def _memsets(call: Callable[[], None]) -> int:
    """How often memory is set in front of the kernel: maxima that it gathers, perhaps a counter of tiles."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.key.startswith("Memset"))


def _try(variant: Variant, handle: Any) -> str:
    """What became of it: its time, or the step that failed and all that was said."""
    import cudnn

    graph, inputs, outputs = _graph(variant, handle)
    modes = [getattr(cudnn.heur_mode, mode) for mode in variant.modes.split()]
    started = time.perf_counter()
    for stage, step in (
        ("validate", graph.validate),
        ("build_operation_graph", graph.build_operation_graph),
        ("create_execution_plans", lambda: graph.create_execution_plans(modes)),
        ("check_support", graph.check_support),
        ("build_plans", graph.build_plans),
    ):
        try:
            step()
        except Exception as error:  # whatever it is, it is what is asked for
            return f"FAILED in {stage}: {type(error).__name__}: {error}"
    took = time.perf_counter() - started
    call = _call(variant, graph, inputs, outputs, handle)
    time_us, memsets = _microseconds(call), _memsets(call)
    name = graph.get_plan_name_at_index(0)
    count = graph.get_execution_plan_count()
    return (
        f"OK {time_us:.0f} us, memory set {memsets} times, the first of {count} plans is {name}, "
        f"{graph.get_workspace_size()} bytes, {took:.1f} s"
    )


def diagnose(log: Path) -> bool:
    """Try all variants; whether the one that tonfa runs works."""
    import cudnn

    good = False
    torch.empty(1, device="cuda")
    handle = cudnn.create_handle()
    cudnn.set_stream(handle, torch.cuda.current_stream().cuda_stream)
    for variant in VARIANTS:
        read = log.stat().st_size
        try:
            outcome = _try(variant, handle)
        except Exception as error:
            outcome = f"FAILED when run: {type(error).__name__}: {error}"
        print(f"{variant.name}: {outcome}")
        if variant == BASE:
            good = outcome.startswith("OK")
        if not outcome.startswith("OK"):
            said = log.read_bytes()[read:].decode(errors="replace").splitlines()
            reasons = [line for line in said if "Reason:" in line or "rror" in line]
            print("\n".join(f"    {line}" for line in reasons[-40:]))
    libraries()
    return good
