"""Runs the CUDA kernels on the CPU: device code compiled by g++ with `simt.hpp` in place of CUDA.

Inline PTX becomes calls of functions that are named after the instructions. Slow (a tile takes milliseconds), but it is
the device code itself that runs, with the launches, grids and structs of the host code.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from tonfa.kernels.cuda.kernel import Kernel, Struct, _device_code

COMPILER = shutil.which("g++")
HERE = Path(__file__).parent

_STATUS = {1: "threads wait for ever", 2: "some threads miss a barrier", 3: "a 16-byte copy is misaligned"}
_DYNAMIC_SHARED = 128 << 10
_OPERAND = re.compile(r'"[=+]?[rfln]"\s*\(((?:[^()]|\([^()]*\))*)\)')


def _call(match: re.Match[str]) -> str:
    """An asm statement as a call of the instruction's function with its operands, outputs first."""
    statement = match[0]
    text = re.split(r'"\s*:', statement)[0].split('"', 1)[1]
    instruction = re.search(r"(?:^|; )\s*((?:cvt|max|mma|cp|ldmatrix|rcp)[\w.:]*)", text)
    assert instruction, statement
    name = re.sub(r"[.:]+", "_", instruction[1].rstrip(";"))
    if name == "cvt_f32_f16":
        name += "_h" if "%0, h" in text else "_l"
    return f"{name}({', '.join(_OPERAND.findall(statement))});"


def translate(text: str) -> str:
    """Device code for the CPU."""
    text = re.sub(r"#pragma unroll.*", "", text)
    text = re.sub(r"\bsize_t\b", "std::size_t", text)
    text = re.sub(r"extern (__shared__ [^;]*)\[\];", rf"\1[{_DYNAMIC_SHARED}];", text)
    return re.sub(r"\basm(?: volatile)?\(\s*\".*?\);(?=\s)", _call, text, flags=re.S)


@lru_cache(maxsize=64)
def library(kernel: Kernel, folder: Path) -> Any:
    """The kernel as a function of the CPU."""
    place = folder / re.sub(r"\W+", "_", str(kernel))
    place.mkdir(exist_ok=True)
    for name, text in _device_code("tonfa.kernels.cuda").items():
        (place / name).write_text(translate(text))
    arguments = ", ".join(f"*static_cast<{p.__name__}*>(parameters[{i}])" for i, p in enumerate(kernel.parameters))
    checks = "".join(p.layout() for p in kernel.parameters)
    (place / "main.cpp").write_text(
        f'#include "simt.hpp"\n#include "{kernel.name}.cu"\n{checks}'
        'extern "C" int run(unsigned x, unsigned y, unsigned z, unsigned threads, void** parameters) {\n'
        f"    return run_blocks({{x, y, z}}, threads, [&] {{ {kernel.name}({arguments}); }});\n}}\n"
    )
    assert COMPILER is not None
    defines = [f"-D{name}={value}" for name, value in kernel.defines]
    options = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-ffp-contract=off", "-Wno-invalid-offsetof"]
    command = [COMPILER, *options, *defines, f"-I{HERE}", "-o", str(place / "run.so"), str(place / "main.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:5000]
    return ctypes.CDLL(str(place / "run.so")).run


def launcher(folder: Path) -> Any:
    """A replacement of `tonfa.kernels.cuda.launch.launch`."""

    def launch(kernel: Kernel, device: torch.device, grid: tuple[int, ...], *parameters: Struct) -> None:
        assert device.type == "cpu" and tuple(type(p) for p in parameters) == kernel.parameters
        pointers = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(p) for p in parameters))
        status = library(kernel, folder)(*(*grid, 1, 1)[:3], kernel.threads, pointers)
        assert status == 0, f"{kernel}: {_STATUS[status]}"

    return launch
