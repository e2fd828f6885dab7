"""Every kernel compiled for every architecture, without a GPU: its instructions and its resources.

Needs NVRTC, cuobjdump and nvdisasm (the `dev` extra), and is skipped where they are missing.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

import machine_code
from tonfa.bench import prediction
from tonfa.errors import KernelError
from tonfa.kernels.cuda import compiler
from tonfa.kernels.cuda.catalog import kernels
from tonfa.kernels.cuda.kernel import Kernel, build

NATIVE = (80, 86, 89)
SHARED_BYTES_OF_A_PROCESSOR = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10}
REGISTERS_OF_A_PROCESSOR = 65536


pytestmark = machine_code.NEEDED

CASES = [(kernel, architecture) for architecture in (*NATIVE, 90) for kernel in kernels()]


@pytest.mark.parametrize(("kernel", "architecture"), CASES, ids=lambda value: str(value))
def test_kernel(kernel: Kernel, architecture: int, tmp_path: Path) -> None:
    code = machine_code.read(kernel, architecture, tmp_path)
    values = dict(kernel.defines)
    count = {
        kind: sum(n for name, n in code.instructions.items() if name.startswith(kind))
        for kind in ("IMMA.16864", "IMMA", "HMMA.16816", "LDL", "STL", "LDGSTS", "LDSM", "ATOM", "RED.")
    }
    assert count["ATOM"] == count["RED."] == 0
    assert count["LDL"] == count["STL"] == code.stack == 0, "registers are spilled"
    assert code.registers <= 255

    if kernel.name.startswith("product"):
        kind = "IMMA.16864.U4.S4" if values["UNSIGNED"] == "true" else "IMMA.16864.S4.S4"
        if architecture in NATIVE:
            assert code.instructions[kind] == count["IMMA.16864"] == count["IMMA"] == 32
            for what, used in (("registers", code.registers * kernel.threads), ("shared", code.shared + 1024)):
                limit = SHARED_BYTES_OF_A_PROCESSOR[architecture] if what == "shared" else REGISTERS_OF_A_PROCESSOR
                assert 2 * used <= limit, f"{what} leave no room for two blocks on a processor"
        else:
            assert count["IMMA.16864"] == 0, "this architecture has no INT4 instruction: it is emulated"
        assert count["LDSM"] == 10 and count["LDGSTS"] >= 25 and count["HMMA.16816"] >= 32
    if "RANK_CHUNK" in values:
        blocks = 2 if values["RANK_CHUNK"] == "32" else 1
        assert blocks * code.registers * kernel.threads <= REGISTERS_OF_A_PROCESSOR
        assert count["HMMA.16816"] == int(values["RANK_CHUNK"])


def test_the_main_loop_is_bound_by_tensor_cores(tmp_path: Path) -> None:
    """An INT4 instruction occupies a quarter of an sm_86 or sm_89 processor for 16 cycles, any other at least one."""
    kernel = next(k for k in kernels([torch.bfloat16]) if k.name == "product")
    for architecture in (86, 89):
        loop = smallest_loop(kernel, architecture, tmp_path, IMMA=32)
        assert loop["FFMA"] == 256
        assert loop.total() < 0.85 * 16 * loop["IMMA"]


def of(name: str, **values: str) -> Kernel:
    """The first bfloat16 kernel of this name with these values."""
    return next(k for k in kernels([torch.bfloat16]) if k.name == name and values.items() <= dict(k.defines).items())


@pytest.mark.parametrize("architecture", [86, 89])
def test_predictions_count_the_instructions_that_there_are(architecture: int, tmp_path: Path) -> None:
    """Within a tenth, so that another compiler's choices do not matter and ours do."""
    assert 16 * smallest_loop(of("product"), architecture, tmp_path, IMMA=32)["IMMA"] == prediction.STEP_CYCLES
    for (name, chunk), slots in prediction.QUANTIZE_SLOTS.items():
        loop = smallest_loop(of(name, RANK_CHUNK=str(chunk)), architecture, tmp_path, HMMA=chunk)
        moments = 400 if name == "norm_modulate_quantize" else 0
        assert loop.total() + moments == pytest.approx(slots, rel=0.1)
    loop = smallest_loop(of("w4a16"), architecture, tmp_path, HMMA=3 * prediction.W4A16_HMMA)
    assert loop.total() / 3 == pytest.approx(prediction.W4A16_SLOTS, rel=0.1)
    for name, slots in prediction.EPILOGUE_SLOTS.items():
        kernel = of(name)
        whole = machine_code.read(kernel, architecture, tmp_path).instructions
        loops = [smallest_loop(kernel, architecture, tmp_path, **count) for count in ({"IMMA": 32}, {"HMMA": 32})]
        assert whole.total() - whole["NOP"] - sum(loop.total() for loop in loops) == pytest.approx(slots, rel=0.1)


def smallest_loop(kernel: Kernel, architecture: int, folder: Path, **count: int) -> Counter[str]:
    """Instructions of the smallest loop that holds so many of a kind: IMMA=32."""
    path = folder / "kernel.cubin"
    path.write_bytes(build(kernel, architecture)[0])
    text = subprocess.run(
        [str(machine_code.tool("nvdisasm")), "-c", str(path)], capture_output=True, text=True, check=True
    ).stdout
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(re.sub(r"^@!?U?P\w+\s+", "", found[1]))
    loops = []
    for i, line in enumerate(lines):
        target = re.match(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and labels[target[1]] <= i:
            loops.append(Counter(re.split(r"[. ]", line)[0] for line in lines[labels[target[1]] : i + 1]))
    return min((loop for loop in loops if count.items() <= loop.items()), key=lambda loop: loop.total())


def test_errors_name_kernel_architecture_and_log() -> None:
    with pytest.raises(KernelError, match=r"(?s)broken does not compile for sm_86.*identifier .nonsense. is undefined"):
        compiler.compile_cubin("broken", "__global__ void broken() { nonsense(); }", {}, [], "86")
    with pytest.raises(KernelError, match="fine does not compile for sm_12"):
        compiler.compile_cubin("fine", "__global__ void fine() {}", {}, [], "12")


def test_structs_of_host_and_device_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from tonfa.kernels.cuda import w4a16

    class W4A16(w4a16.Struct):
        _fields_ = w4a16.W4A16._fields_[1:]

    kernel = w4a16.kernel(torch.bfloat16)
    wrong = Kernel(kernel.name, kernel.defines, (W4A16,), kernel.threads)
    with pytest.raises(KernelError, match="W4A16 of the host differs"):
        build(wrong, 86)
