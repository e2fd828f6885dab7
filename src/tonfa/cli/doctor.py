"""`tonfa doctor`: what this machine is, and which kernel runs what on it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tonfa.cli.failures import Debug, command
from tonfa.cli.options import ActivationsOption, DeviceOption, parse_device
from tonfa.errors import UnsupportedError
from tonfa.version import __version__

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from tonfa.kernels.cuda.kernel import Kernel

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "triton",
    "nvidia-cudnn-frontend",
    "numba",
    "cuda-bindings",
)


@command(interrupted="nothing was changed")
def doctor(
    device: DeviceOption = "auto",
    activations: ActivationsOption = None,
    compile_kernels: Annotated[
        bool, typer.Option("--compile", help="Compile the INT4 kernels, on sm_90 Hopper's as well, and time it.")
    ] = False,
    arch: Annotated[
        int | None, typer.Option(help="With --compile: for this architecture (86 is sm_86) instead of the GPU's own.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show versions, devices, and which backend computes each operation, with the reason where one cannot.

    Example:

    ```
    tonfa doctor --device cpu --activations int8
    tonfa doctor --compile --arch 86
    ```
    """
    facts = examine(device, activations)
    if compile_kernels:
        facts["compiled"] = compile_all(device, arch)
    elif arch is not None:
        raise UnsupportedError("--arch chooses what --compile compiles for; give both")
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)


def examine(device: str, activations: str | None) -> dict[str, Any]:
    """Everything that the command shows."""
    import torch

    from tonfa.dispatch import default_activations, report

    place = parse_device(device)
    default = default_activations(place)
    policy = activations or default
    return {
        "tonfa": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "cpu": {
            "name": cpu_name(),
            "cores": _cores(),
            "threads": torch.get_num_threads(),
            "exact_int8_products": int8_is_exact(),
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)],
        "device": str(place),
        "default_activations": default,
        "activations": policy,
        "operations": [asdict(row) for row in report(place, policy)],
    }


def compile_all(device: str, arch: int | None) -> dict[str, Any]:
    """Compile every kernel in CUDA C++, or find it in the cache: what was built for what, and how long it took.

    Raises UnsupportedError without NVRTC, and without a GPU unless `arch` names an architecture.
    """
    from tonfa.kernels.cuda import cache, compiler
    from tonfa.kernels.cuda.kernel import build
    from tonfa.kernels.cuda.launch import architecture

    if problem := compiler.problem():
        raise UnsupportedError(f"--compile: {problem}")
    place = parse_device(device)
    own = architecture(place) if place.type == "cuda" else None
    arch = own if arch is None else arch
    if arch is None:
        raise UnsupportedError(f"--compile: {place} is no NVIDIA GPU; name an architecture, such as --arch 86")
    built = []
    for kernel in _kernels(arch, place if arch == own else None):
        start = time.perf_counter()
        code, cached = build(kernel, arch)
        seconds = time.perf_counter() - start
        built.append({"kernel": str(kernel), "bytes": len(code), "cached": cached, "seconds": seconds})
    return {
        "architecture": f"sm_{arch}",
        "compiler": f"NVRTC {compiler.compiler_version()}",
        "cache": str(cache.directory()),
        "kernels": built,
    }


def _kernels(arch: int, gpu: torch.device | None) -> list[Kernel]:
    """What sm_<arch> runs; on `gpu`, or on one with as many multiprocessors as most."""
    from tonfa.kernels.cuda import catalog
    from tonfa.kernels.hopper import catalog as hopper
    from tonfa.kernels.hopper.device_facts import multiprocessors

    if arch != 90:
        return catalog.kernels()
    return catalog.kernels() + hopper.kernels(hopper.MULTIPROCESSORS if gpu is None else multiprocessors(gpu))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    """The model that the operating system reports."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def int8_is_exact() -> bool:
    """Whether PyTorch's INT8 product adds up the largest values exactly: some CPUs saturate pairs at 16 bits."""
    import torch

    a = torch.full((32, 256), -128, dtype=torch.int8)
    b = torch.full((32, 256), -128, dtype=torch.int8).t()
    a[::2], b[:, ::2] = 127, 127
    return torch.equal(torch._int_mm(a, b), a.int() @ b.int())


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties: torch._C._CudaDeviceProperties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "memory": properties.total_memory,
    }


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tonfa.cli.console import size

    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(f"tonfa {facts['tonfa']}, Python {facts['python']} on {sys.platform}")
    packages = (f"{name} {version or 'not installed'}" for name, version in facts["packages"].items())
    console.print(", ".join(packages))
    cpu = facts["cpu"]
    exact = "exact" if cpu["exact_int8_products"] else "NOT exact"
    console.print(f"\nCPU   {cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads, INT8 products {exact}")
    for i, gpu in enumerate(facts["gpus"]):
        console.print(f"GPU {i} {gpu['name']}, {gpu['architecture']}, {size(gpu['memory'])}")
    if not facts["gpus"]:
        console.print(f"GPU   none that PyTorch can use (built for CUDA: {facts['cuda'] or 'no'})")
    console.print(
        f"\nOn {facts['device']}: activations {facts['activations']} (default {facts['default_activations']})"
    )
    table = Table("operation", "backend", "runs", box=None, pad_edge=False, header_style="bold")
    for row in facts["operations"]:
        table.add_row(row["op"], row["backend"], _runs(row))
    console.print(table)
    if "compiled" in facts:
        _print_compiled(console, facts["compiled"])


def _print_compiled(console: Console, compiled: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("kernel", "bytes", "seconds", box=None, pad_edge=False, header_style="bold")
    for row in compiled["kernels"]:
        table.add_row(row["kernel"], str(row["bytes"]), "cached" if row["cached"] else f"{row['seconds']:.2f}")
    console.print(f"\nCompiled for {compiled['architecture']} by {compiled['compiler']}, kept in {compiled['cache']}")
    console.print(table)
    fresh = [row["seconds"] for row in compiled["kernels"] if not row["cached"]]
    console.print(f"{len(compiled['kernels'])} kernels, {len(fresh)} compiled now in {sum(fresh):.1f} s")


def _runs(row: dict[str, Any]) -> str:
    if not row["runs"]:
        return f"no: {row['note']}"
    return "yes (kernel)" if row["note"] == "kernel" else "yes (composed)"
