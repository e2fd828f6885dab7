"""Loading and starting kernels, with a driver that only takes notes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tonfa.errors import KernelError
from tonfa.kernels.cuda import launch as module
from tonfa.kernels.cuda.product_gelu_quantize import Partials, add_kernel
from tonfa.kernels.cuda.w4a16 import W4A16


class Status(int):
    name = "CUDA_ERROR_LAUNCH_FAILED"


class Driver:
    """The functions of `cuda.bindings.driver` that are used; each call is noted, those in `failing` fail."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
    CUlaunchAttributeID = SimpleNamespace(
        CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION="early", CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION="cluster"
    )
    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="most",
        CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT="part",
    )
    CUlaunchConfig = SimpleNamespace

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing: set[str] = set()
        self.context = 0
        self.mode = "global"

    def CUlaunchAttribute(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name in self.failing:
                return (Status(719), None)
            if name == "cuCtxGetCurrent":
                return (0, self.context)
            if name == "cuCtxSetCurrent":
                self.context = arguments[0]
            if name == "cuThreadExchangeStreamCaptureMode":
                before, self.mode = self.mode, arguments[0]
                return (0, before)
            if name == "cuLaunchKernel":
                pointers = (ctypes.c_void_p * 1).from_address(arguments[9])
                partials = Partials.from_address(pointers[0])
                self.calls[-1] = (*self.calls[-1][:10], partials.count, partials.slices)
                return (0,)
            return (0, 7)

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    fake = Driver()
    monkeypatch.setattr(module, "_driver", lambda: fake)
    monkeypatch.setattr(module, "build", lambda kernel, target: (b"code for %d" % target, False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=100 + index))
    for cached in (module._library, module._function, module._config):
        cached.cache_clear()
    yield fake
    for cached in (module._library, module._function, module._config):
        cached.cache_clear()


def start(index: int = 0, grid: tuple[int, ...] = (5, 2), count: int = 3) -> None:
    module.launch(add_kernel(), torch.device("cuda", index), grid, Partials(8, 16, count, 4))


def test_arguments_reach_the_kernel_on_the_current_stream(driver: Driver) -> None:
    start(count=3)
    start(index=1, grid=(9,), count=6)
    assert driver.named("cuLaunchKernel") == [
        (7, 5, 2, 1, 128, 1, 1, 0, 100, 3, 4),
        (7, 9, 1, 1, 128, 1, 1, 0, 101, 6, 4),
    ]


def test_the_latest_kernel_of_a_stream_is_known(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_latest", {})
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    assert module.latest(one) == (100, None)
    start()
    assert module.latest(one) == (100, "add_partials") and module.latest(other) == (101, None)
    driver.failing.add("cuLaunchKernel")
    with pytest.raises(KernelError):
        start(index=1)
    assert module.latest(other) == (101, None)


@pytest.mark.parametrize(
    ("shared", "early", "expected"),
    [(1024, False, []), (60 << 10, False, [(7, "most", 60 << 10)]), (0, True, [(7, "part", 100)])],
)
def test_shared_memory_is_asked_for(
    driver: Driver, shared: int, early: bool, expected: list[tuple[int, str, int]]
) -> None:
    module.launch(
        replace(add_kernel(), shared=shared, early=early), torch.device("cuda", 0), (1,), Partials(8, 16, 3, 4)
    )
    assert driver.named("cuFuncSetAttribute") == expected


@pytest.mark.parametrize(
    ("early", "cluster", "expected"), [(True, 1, ["early"]), (False, 2, ["cluster"]), (True, 2, ["early", "cluster"])]
)
def test_early_starts_and_clusters_are_attributes(
    driver: Driver, early: bool, cluster: int, expected: list[str]
) -> None:
    kernel = replace(add_kernel(), early=early, cluster=cluster)
    module.launch(kernel, torch.device("cuda", 0), (6, 2), Partials(8, 16, 3, 4))
    ((config, function, _, extra),) = driver.named("cuLaunchKernelEx")
    assert (function, extra) == (7, 0) and not driver.named("cuLaunchKernel")
    assert (config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.hStream) == (6, 2, 1, 128, 100)
    assert config.numAttrs == len(config.attrs) and [attribute.id for attribute in config.attrs] == expected
    for attribute in config.attrs:
        if attribute.id == "early":
            assert attribute.value.programmaticStreamSerializationAllowed == 1
        else:
            assert vars(attribute.value.clusterDim) == {"x": 2, "y": 1, "z": 1}


def test_code_is_loaded_once_for_an_architecture_and_once_on_each_device(driver: Driver) -> None:
    for index in (0, 1, 0, 1):
        start(index)
    assert [call[0] for call in driver.named("cuLibraryLoadData")] == [b"code for 86"]
    assert len(driver.named("cuKernelGetFunction")) == 2


def test_a_thread_without_context_gets_the_devices_own(driver: Driver) -> None:
    start()
    start()
    assert driver.named("cuDevicePrimaryCtxRetain") == [(7,)] and driver.named("cuCtxSetCurrent") == [(7,)]


def test_loading_while_a_graph_is_captured_leaves_the_mode_as_it_was(driver: Driver) -> None:
    start()
    driver.failing.add("cuLibraryGetKernel")
    with pytest.raises(KernelError, match=r"finding add_partials\[\] failed: CUDA_ERROR_LAUNCH_FAILED"):
        start(index=1)
    modes = [call[0] for call in driver.named("cuThreadExchangeStreamCaptureMode")]
    assert modes == ["relaxed", "global"] * 2 and driver.mode == "global"


def test_a_failed_start_names_kernel_grid_and_device(driver: Driver) -> None:
    driver.failing.add("cuLaunchKernel")
    with pytest.raises(KernelError, match=r"starting add_partials\[\] with 5 x 2 x 1 blocks on cuda:1 failed"):
        start(index=1)


def test_other_structs_are_refused(driver: Driver) -> None:
    with pytest.raises(TypeError, match=r"add_partials\[\] takes Partials"):
        module.launch(add_kernel(), torch.device("cuda", 0), (1,), W4A16())
    assert not driver.calls
