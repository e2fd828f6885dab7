"""Loading kernels and starting them on torch's current stream.

A kernel is loaded once for each device, outside of what a CUDA graph that is being captured may forbid; a launch itself
is what a graph records. Whoever calls has checked shapes, dtypes and alignment: see `contract.py`.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

from tonfa.errors import KernelError
from tonfa.kernels.cuda.compiler import compiler_version
from tonfa.kernels.cuda.kernel import Kernel, Struct, build

_SHARED_UNASKED = 48 << 10
"""Bytes of dynamic shared memory that a kernel gets without asking for more."""

_ALL_SHARED = 100
"""Percent of L1 that is shared memory, for kernels that start one after another without a pause: a multiprocessor that
has to divide it anew must be idle first."""


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _done(result: tuple[Any, ...], what: str) -> Any:
    if int(result[0]) != 0:
        raise KernelError(f"{what} failed: {result[0].name}")
    return result[1] if len(result) > 1 else None


@lru_cache(maxsize=1)
def problem() -> str | None:
    """None if the driver is of NVRTC's major version or newer, and so loads what NVRTC compiles; otherwise why not."""
    try:
        version = _done(_driver().cuDriverGetVersion(), "asking the driver for its version")
    except (KernelError, RuntimeError) as error:
        return f"the NVIDIA driver cannot be asked ({error}): update it"
    major, minor = version // 1000, version % 1000 // 10
    if major >= int(compiler_version().split(".")[0]):
        return None
    return (
        f"the driver is made for CUDA {major}.{minor}, NVRTC is {compiler_version()}: update the driver, or take an "
        f"older compiler by pip install 'cuda-bindings<{major + 1}' nvidia-cuda-nvrtc-cu{major}"
    )


def architecture(device: torch.device) -> int:
    """86 for sm_86."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache(maxsize=256)
def _library(kernel: Kernel, target: int) -> Any:
    driver = _driver()
    code, _ = build(kernel, target)
    what = f"loading {kernel} for sm_{target}"
    return _done(driver.cuLibraryLoadData(code, None, None, 0, None, None, 0), what)


@lru_cache(maxsize=1024)
def _function(kernel: Kernel, index: int) -> Any:
    """The kernel in the context of device `index`, which must be the current one."""
    driver = _driver()
    before = _done(
        driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED),
        "preparing to load a kernel",
    )
    try:
        library = _library(kernel, architecture(torch.device("cuda", index)))
        found = _done(driver.cuLibraryGetKernel(library, kernel.name.encode()), f"finding {kernel}")
        function = _done(driver.cuKernelGetFunction(found), f"loading {kernel} on cuda:{index}")
        if kernel.shared > _SHARED_UNASKED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _done(driver.cuFuncSetAttribute(function, attribute, kernel.shared), f"shared memory of {kernel}")
        if kernel.early:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _done(driver.cuFuncSetAttribute(function, attribute, _ALL_SHARED), f"shared memory of {kernel}")
        return function
    finally:
        driver.cuThreadExchangeStreamCaptureMode(before)


def _make_context_current(index: int) -> None:
    """A thread that used torch for nothing yet has no context, although torch calls the device current."""
    driver = _driver()
    if int(_done(driver.cuCtxGetCurrent(), "reading the current context")) == 0:
        device = _done(driver.cuDeviceGet(index), f"finding cuda:{index}")
        context = _done(driver.cuDevicePrimaryCtxRetain(device), f"starting cuda:{index}")
        _done(driver.cuCtxSetCurrent(context), f"selecting cuda:{index}")


@lru_cache(maxsize=4096)
def _config(kernel: Kernel, x: int, y: int, z: int, stream: int) -> Any:
    """A launch with attributes: programmatic dependent launch, clusters."""
    driver = _driver()
    attributes = []
    if kernel.early:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    if kernel.cluster > 1:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        size = attribute.value.clusterDim
        size.x, size.y, size.z = kernel.cluster, 1, 1
        attributes.append(attribute)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = x, y, z
    config.blockDimX, config.blockDimY, config.blockDimZ = kernel.threads, 1, 1
    config.sharedMemBytes, config.hStream = kernel.shared, stream
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


_latest: dict[tuple[int, int], str] = {}
"""Of a device and stream."""


def latest(device: torch.device) -> tuple[int, str | None]:
    """The current stream of `device`, and the name of the kernel that `launch` started last on it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    stream = torch.cuda.current_stream(index).cuda_stream
    return stream, _latest.get((index, stream))


def launch(kernel: Kernel, device: torch.device, grid: tuple[int, ...], *parameters: Struct) -> None:
    """Start the kernel with `grid` blocks on the current stream of `device`. Raises KernelError if that fails."""
    if tuple(type(p) for p in parameters) != kernel.parameters:
        raise TypeError(f"{kernel} takes {', '.join(p.__name__ for p in kernel.parameters)}")
    driver = _driver()
    index = torch.cuda.current_device() if device.index is None else device.index
    pointers = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(p) for p in parameters))
    x, y, z = (*grid, 1, 1)[:3]
    with torch.cuda.device(index):
        _make_context_current(index)
        function = _function(kernel, index)
        stream = torch.cuda.current_stream(index).cuda_stream
        address = ctypes.addressof(pointers)
        if kernel.early or kernel.cluster > 1:
            result = driver.cuLaunchKernelEx(_config(kernel, x, y, z, stream), function, address, 0)
        else:
            result = driver.cuLaunchKernel(function, x, y, z, kernel.threads, 1, 1, kernel.shared, stream, address, 0)
    _done(result, f"starting {kernel} with {x} x {y} x {z} blocks on cuda:{index}")
    _latest[index, stream] = kernel.name
