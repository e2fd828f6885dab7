"""Which of cuDNN's plans are kept, with a cuDNN that computes nothing and notices what is dropped too early.

A plan owns the machine code of its kernel: it must outlive each run, and each CUDA graph that has recorded one.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tonfa.errors import UnsupportedError
from tonfa.ops.attention_fp8 import SCALARS, QuantizedHeads

CPU = torch.device("cpu")


class Device:
    """What runs on it, with the stream, and what graphs hold, by length of the sequence."""

    def __init__(self) -> None:
        self.capturing = False
        self.built: list[int] = []
        self.stream = SimpleNamespace(cuda_stream=0)
        self.running: set[tuple[int, int]] = set()
        self.recorded: set[int] = set()
        self.dropped: list[int] = []
        self.dropped_too_early: list[int] = []
        self.refused: set[int] = set()

    def executes(self, length: int) -> None:
        if self.capturing:
            self.recorded.add(length)
        else:
            self.running.add((self.stream.cuda_stream, length))

    def still_needs(self, length: int) -> bool:
        return self.capturing or length in self.recorded or any(length == other for _, other in self.running)


class NotSupportedError(Exception):
    pass


def fake_cudnn(device: Device) -> ModuleType:
    class Operand:
        def __getattr__(self, name: str) -> Callable[..., Operand]:
            return lambda *_: self

    class Graph:
        def __init__(self, **_: object) -> None:
            self.length = 0

        def tensor(self, dim: tuple[int, ...], **_: object) -> Operand:
            self.length = max(self.length, dim[2])
            return Operand()

        def sdpa_fp8(self, *_: object, **__: object) -> tuple[Operand, ...]:
            return tuple(Operand() for _ in range(4))

        def build(self, modes: list[object]) -> None:
            assert not device.capturing
            if self.length in device.refused:
                raise NotSupportedError("no engine")
            device.built.append(self.length)

        def get_workspace_size(self) -> int:
            return 0

        def execute(self, buffers: object, workspace: object, handle: object) -> None:
            device.executes(self.length)

        def __del__(self) -> None:
            if self.length in device.built:
                device.dropped.append(self.length)
                if device.still_needs(self.length):
                    device.dropped_too_early.append(self.length)

    module = ModuleType("cudnn")
    module.__dict__.update(
        pygraph=Graph,
        data_type=SimpleNamespace(FP8_E4M3=0, FLOAT=1),
        heur_mode=SimpleNamespace(A=0, FALLBACK=1),
        create_handle=object,
        set_stream=lambda handle, stream: None,
        backend_version=lambda: 91900,
        cudnnGraphNotSupportedError=NotSupportedError,
    )
    return module


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: device.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.capturing)

    class Event:
        def record(self, stream: SimpleNamespace) -> None:
            assert not device.capturing
            self.before = {run for run in device.running if run[0] == stream.cuda_stream}

        def synchronize(self) -> None:
            device.running -= self.before

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return device


@pytest.fixture
def plans(device: Device, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of the module, with room for three plans."""
    spec = importlib.util.find_spec("tonfa.kernels.attention.cudnn_fp8")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as while_loading:
        while_loading.setitem(sys.modules, "cudnn", fake_cudnn(device))
        spec.loader.exec_module(module)
    monkeypatch.setattr(module, "LIMIT", 3)
    return module


def heads(length: int) -> QuantizedHeads:
    q, k, v = torch.zeros(3, 1, length, 2, 16).to(torch.float8_e4m3fn).transpose(2, 3)
    return QuantizedHeads(q, k, v, torch.zeros(1), torch.ones(len(SCALARS)), torch.ones(1))


def test_plans_are_built_once_and_few_are_kept(plans: ModuleType, device: Device) -> None:
    for length in (1, 2, 3, 1, 4, 1, 2):
        assert plans.attend(heads(length)).shape == (1, length, 2, 16)
    assert device.built == [1, 2, 3, 4, 2] and device.dropped == [2, 3]


def test_no_plan_is_dropped_while_it_runs(plans: ModuleType, device: Device) -> None:
    for length in range(1, 9):
        plans.attend(heads(length))
    assert device.dropped == [1, 2, 3, 4, 5] and not device.dropped_too_early


def test_no_plan_is_dropped_while_any_stream_runs_it(plans: ModuleType, device: Device) -> None:
    for stream in (0, 1):
        device.stream = SimpleNamespace(cuda_stream=stream)
        plans.attend(heads(1))
    for length in (2, 3, 4):
        plans.attend(heads(length))
    assert device.dropped == [1] and not device.dropped_too_early
    assert device.running == {(1, 2), (1, 3), (1, 4)}, "waited for more than the dropped plan"


def test_no_plan_is_dropped_that_a_graph_holds(plans: ModuleType, device: Device) -> None:
    for length in (1, 2, 3, 4, 5):
        plans.attend(heads(length))
        device.capturing = True
        plans.attend(heads(length))
        device.capturing = False
    for length in range(6, 12):
        plans.attend(heads(length))
    assert device.dropped == [6, 7, 8] and not device.dropped_too_early
    for length in (1, 2, 3, 4, 5):
        plans.attend(heads(length))
    assert len(device.built) == 11


def test_recorded_plans_leave_room_for_others(plans: ModuleType, device: Device) -> None:
    """Two shapes in turn, beside more graphs than there is room for plans, are built once each."""
    for length in (1, 2, 3, 4):
        plans.attend(heads(length))
        device.capturing = True
        plans.attend(heads(length))
        device.capturing = False
    for _ in range(3):
        for length in (5, 6):
            plans.attend(heads(length))
    assert device.built == [1, 2, 3, 4, 5, 6] and not device.dropped
    device.capturing = True
    for length in (5, 6):
        plans.attend(heads(length))
    assert device.recorded == {1, 2, 3, 4, 5, 6} and not device.dropped


def test_nothing_is_built_or_dropped_while_a_graph_is_recorded(plans: ModuleType, device: Device) -> None:
    for length in (1, 2, 3):
        plans.attend(heads(length))
    device.capturing = True
    with pytest.raises(RuntimeError, match=r"attention of shape \(1, 2, 4, 16\) must run once before it is recorded"):
        plans.attend(heads(4))
    plans.attend(heads(1))
    assert device.built == [1, 2, 3] and not device.dropped


def test_a_recorded_check_holds_the_plan(plans: ModuleType, device: Device) -> None:
    """`check` is asked in a step that is recorded; the product that follows relies on the answer."""
    plans.check(heads(1).q.shape, CPU)
    device.capturing = True
    plans.check(heads(1).q.shape, CPU)
    plans.attend(heads(1))
    device.capturing = False
    for length in range(2, 8):
        plans.check(heads(length).q.shape, CPU)
    assert 1 not in device.dropped and not device.dropped_too_early


def test_refusals_are_remembered_and_few_are_kept(plans: ModuleType, device: Device) -> None:
    device.refused = {7, 8, 9, 10}
    for _ in range(2):
        with pytest.raises(
            UnsupportedError, match=r"no FP8 attention for shape \(1, 2, 7, 16\): NotSupportedError: no engine"
        ):
            plans.check(heads(7).q.shape, CPU)
    for length in (8, 9, 10):
        with pytest.raises(UnsupportedError):
            plans.check(heads(length).q.shape, CPU)
    assert len(plans._plans) == 3
