"""The Hopper kernels compile without a GPU, and their machine code holds what they are written for."""

from __future__ import annotations

import pytest
import torch

from tonfa.kernels.cuda import compiler
from tonfa.kernels.cuda.kernel import Kernel, build
from tonfa.kernels.hopper import product, quantize
from tonfa.kernels.hopper.product import GATE_RESIDUAL, GELU, NORM_ROPE, PLAIN

KERNELS = [
    product.kernel(torch.bfloat16, PLAIN, 256),
    product.kernel(torch.bfloat16, GELU, 256),
    product.kernel(torch.bfloat16, GATE_RESIDUAL, 224),
    product.kernel(torch.bfloat16, NORM_ROPE, 256),
    product.kernel(torch.float16, PLAIN, 128),
    quantize.kernel(torch.bfloat16, 64, True, False, 3072),
    quantize.kernel(torch.bfloat16, 32, False, False, 3072),
    quantize.kernel(torch.bfloat16, 32, False, True, 12288),
]


@pytest.mark.skipif(compiler.problem() is not None, reason=f"NVRTC: {compiler.problem()}")
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_machine_code(kernel: Kernel) -> None:
    from machine_code import disassemble, instructions

    sass = disassemble(build(kernel, 90)[0])
    opcodes = instructions(sass)
    assert not [op for op in opcodes if op.startswith(("LDL", "STL"))]
    if kernel.name == "product":
        assert sum(op.startswith("QGMMA") for op in opcodes) == 4
        assert any(op.startswith("UTMALDG") for op in opcodes) and any(op.startswith("UBLKCP") for op in opcodes)
    else:
        assert any(op.startswith("HMMA.16816") for op in opcodes)
