"""CUDA C++ to machine code at run time, by NVRTC through `cuda-bindings`.

`cuda-bindings` rather than `cuda-core`: CUDA builds of PyTorch (2.11 and later) bring it together with NVRTC, and it
is all that is needed. Code is compiled for one architecture exactly, so no driver compiles anything and the driver may
be older than the compiler (within its major version). No header files are needed beside our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from tonfa.errors import KernelError


def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc


@lru_cache(maxsize=1)
def problem() -> str | None:
    """None if NVRTC can be used, otherwise why not and what would help."""
    try:
        compiler_version()
    except ImportError:
        return "cuda-bindings is not installed: pip install 'tonfa[cuda]'"
    except RuntimeError as error:
        first_line = str(error).strip().splitlines()[:1] or [type(error).__name__]
        return f"NVRTC cannot be loaded ({first_line[0]}): pip install 'tonfa[cuda]'"
    return None


@lru_cache(maxsize=1)
def compiler_version() -> str:
    """Major and minor version of NVRTC."""
    nvrtc = _nvrtc()
    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC does not tell its version: {status.name}")
    return f"{major}.{minor}"


def compile_cubin(
    name: str, source: str, headers: Mapping[str, str], options: Sequence[str], architecture: str
) -> bytes:
    """Machine code of `source` for sm_<architecture> ("86", "90a"); `headers` are what it may include, by name.

    Raises KernelError with the kernel, the architecture and the compiler's log.
    """
    nvrtc = _nvrtc()
    success = nvrtc.nvrtcResult.NVRTC_SUCCESS

    def done(result: tuple[Any, ...], what: str) -> Any:
        if result[0] != success:
            raise KernelError(f"{name} for sm_{architecture}: {what} failed: {result[0].name}")
        return result[1] if len(result) > 1 else None

    texts, names = ([t.encode() for t in side] for side in (headers.values(), headers))
    created = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), len(headers), texts, names)
    program = done(created, "reading the source")
    try:
        flags = [option.encode() for option in (f"--gpu-architecture=sm_{architecture}", *options)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        log = bytes(done(nvrtc.nvrtcGetProgramLogSize(program), "reading the log"))
        done(nvrtc.nvrtcGetProgramLog(program, log), "reading the log")  # writes into the object's memory
        if status != success:
            text = log.rstrip(b"\0").decode(errors="replace").strip()
            raise KernelError(f"{name} does not compile for sm_{architecture} ({status.name}):\n{text}")
        code = bytes(done(nvrtc.nvrtcGetCUBINSize(program), "reading the machine code"))
        done(nvrtc.nvrtcGetCUBIN(program, code), "reading the machine code")
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)
