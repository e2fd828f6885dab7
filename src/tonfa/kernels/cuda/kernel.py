"""A kernel: its source, what it is specialized for, the structs it takes; and its machine code, compiled once."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

import torch

from tonfa.kernels.cuda import cache
from tonfa.kernels.cuda.compiler import compile_cubin, compiler_version

_OPTIONS = ("--std=c++17",)

ELEMENTS = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}
"""The device code's names of the dtypes that the kernels compute with."""


class Struct(ctypes.Structure):
    """A kernel's parameter. The device code has a struct of the same name, with the same fields in the same order.

    The compiler checks sizes and names; a test checks the order (NVRTC 13.0 has no `__builtin_offsetof`).
    """

    @classmethod
    def layout(cls) -> str:
        """What must hold of the device code's struct, as C++."""
        conditions = [f"sizeof({cls.__name__}) == {ctypes.sizeof(cls)}"]
        for name, *_ in cls._fields_:
            conditions.append(f"sizeof({cls.__name__}::{name}) == {getattr(cls, name).size}")
        nested = "".join(struct.layout() for struct in cls.nested())
        return f'{nested}static_assert({" && ".join(conditions)}, "{cls.__name__} of the host differs");\n'

    @classmethod
    def nested(cls) -> list[type[Struct]]:
        """The structs among its fields, and those that its arrays are made of."""
        kinds = [
            getattr(field[1], "_type_", None) if issubclass(field[1], ctypes.Array) else field[1]
            for field in cls._fields_
        ]
        return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Struct)]


@dataclass(frozen=True)
class Kernel:
    """One specialization of `device/<name>.cu`, whose `extern "C"` function has the file's name."""

    name: str
    defines: tuple[tuple[str, str], ...]
    parameters: tuple[type[Struct], ...]
    threads: int
    shared: int = 0
    """Bytes of dynamic shared memory of a block."""
    package: str = "tonfa.kernels.cuda"
    """Where the folder `device` is."""
    variant: str = ""
    """"a" for instructions that only this very architecture has, as in sm_90a."""
    preamble: str = ""
    """Device code in front of the source."""
    early: bool = False
    """Whether it may start before the kernel in front of it is done, for which it waits itself (griddepcontrol)."""
    cluster: int = 1
    """Adjacent blocks (x) that run at the same time and reach each other's shared memory; they divide the grid."""

    def __str__(self) -> str:
        return f"{self.name}[{', '.join(f'{key}={value}' for key, value in self.defines)}]"


def specialize(
    name: str, threads: int, *parameters: type[Struct], dtype: torch.dtype | None = None, **values: bool | int
) -> Kernel:
    """The kernel `name` with these values as macros: `unsigned=True` becomes UNSIGNED = true."""
    defines = [] if dtype is None else [("ELEMENT", ELEMENTS[dtype])]
    defines += [(key.upper(), str(value).lower()) for key, value in values.items()]
    return Kernel(name, tuple(defines), parameters, threads)


@lru_cache(maxsize=4)
def _device_code(package: str) -> Mapping[str, str]:
    folder = files(package) / "device"
    return {entry.name: entry.read_text("utf-8") for entry in folder.iterdir() if entry.name.endswith((".cu", ".cuh"))}


def build(kernel: Kernel, architecture: int) -> tuple[bytes, bool]:
    """Machine code for sm_<architecture>, and whether it came from the disk cache.

    Raises KernelError, naming kernel and architecture, with the compiler's log.
    """
    sources = _device_code(kernel.package)
    headers = {name: text for name, text in sorted(sources.items()) if name.endswith(".cuh")}
    source = kernel.preamble + sources[f"{kernel.name}.cu"] + "".join(struct.layout() for struct in kernel.parameters)
    options = (*_OPTIONS, *(f"--define-macro={name}={value}" for name, value in kernel.defines))
    target = f"{architecture}{kernel.variant}"
    everything = (compiler_version(), target, *options, source, *headers, *headers.values())
    name = cache.key(kernel.name, *everything)
    code = cache.read(name)
    if code is not None:
        return code, True
    code = compile_cubin(str(kernel), source, headers, options, target)
    cache.write(name, code)
    return code, False
