"""What a kernel was compiled to: its instructions and resources, read with NVIDIA's disassemblers."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from tonfa.kernels.cuda import compiler
from tonfa.kernels.cuda.kernel import Kernel, build


@lru_cache(maxsize=4)
def tool(name: str) -> Path | None:
    """A disassembler from NVIDIA's packages, or the one that Triton carries."""
    folders = list(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin"))
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return next((folder / name for folder in folders if (folder / name).exists()), None)


NEEDED = [
    pytest.mark.skipif(compiler.problem() is not None, reason=compiler.problem() or ""),
    pytest.mark.skipif(tool("nvdisasm") is None or tool("cuobjdump") is None, reason="no cuobjdump and nvdisasm"),
]


@dataclass(frozen=True)
class MachineCode:
    instructions: Counter[str]
    registers: int
    stack: int
    shared: int


def read(kernel: Kernel, architecture: int, folder: Path) -> MachineCode:
    path = folder / "kernel.cubin"
    path.write_bytes(build(kernel, architecture)[0])

    def run(name: str, *options: str) -> str:
        return subprocess.run([str(tool(name)), *options, str(path)], capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", run("cuobjdump", "--dump-resource-usage")))
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", run("nvdisasm", "-c"), re.M)
    return MachineCode(Counter(lines), int(usage["REG"]), int(usage["STACK"]), int(usage["SHARED"]))
