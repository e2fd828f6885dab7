"""Every kernel compiles for GPUs that are not here, to their tensor cores, without spilling registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Compiled = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    """What `compile_kernels.py` prints, by name of kernel."""
    program = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("product i8 sm_80", "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
        ("product i8 sm_86", "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
        ("product fp8e4nv sm_89", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
        ("product fp8e4nv sm_90", "wgmma.mma_async.sync.aligned.m64n256k32.f32.e4m3.e4m3"),
        ("product fp8e4nv sm_100", "tcgen05.mma.cta_group::1.kind::f8f6f4"),
        ("product fp8e4nv sm_120", "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
        ("product i8 sm_90", "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8"),
        ("gate fp8e4nv sm_90", "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
        ("heads fp8e4nv sm_90", "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3"),
        ("quantize fp8e4nv sm_90", "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
    ],
)
def test_products_run_on_tensor_cores(name: str, instruction: str, compiled: Compiled) -> None:
    assert instruction in compiled[name]["matrix"]


def test_nothing_spills(compiled: Compiled) -> None:
    # ptxas of some versions gives sm_120 eight bytes of stack.
    assert {name: c["stack"] for name, c in compiled.items() if c["stack"] > 8} == {}


def test_shared_memory_suffices(compiled: Compiled) -> None:
    limits = {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}
    for name, c in compiled.items():
        assert c["shared"] <= limits[name.rpartition("sm_")[2]] * 1024, name


def test_descriptors_from_hopper_on(compiled: Compiled) -> None:
    assert compiled["product fp8e4nv sm_90"]["tma"] and not compiled["product fp8e4nv sm_89"]["tma"]
