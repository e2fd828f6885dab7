"""The Hopper kernels compile without a GPU, and their machine code holds what they are written for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import machine_code
from tonfa.kernels.cuda.kernel import Kernel
from tonfa.kernels.hopper import product, quantize
from tonfa.kernels.hopper.product import GATE_RESIDUAL, GELU, GELU_QUANTIZE, NORM_ROPE, PLAIN

KERNELS = [
    product.kernel(torch.bfloat16, PLAIN, 256),
    product.kernel(torch.bfloat16, GELU, 192),
    product.kernel(torch.bfloat16, GATE_RESIDUAL, 224),
    product.kernel(torch.bfloat16, NORM_ROPE, 192),
    product.kernel(torch.float16, PLAIN, 128),
    product.kernel(torch.bfloat16, GELU_QUANTIZE, 192, 32),
    product.kernel(torch.float16, GELU_QUANTIZE, 192, 0),
    quantize.kernel(torch.bfloat16, 64, True, False, 3072),
    quantize.kernel(torch.bfloat16, 32, False, False, 3072),
    quantize.kernel(torch.bfloat16, 32, False, True, 12288),
]


pytestmark = machine_code.NEEDED


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernel(kernel: Kernel, tmp_path: Path) -> None:
    code = machine_code.read(kernel, 90, tmp_path)
    count = {
        kind: sum(n for name, n in code.instructions.items() if name.startswith(kind))
        for kind in ("QGMMA.64x", "HMMA.16816", "UBLKCP", "LDL", "STL")
    }
    assert code.stack <= 32, "registers are spilled"
    if kernel.name == "product":
        assert count["QGMMA.64x"] % 4 == 0 and count["QGMMA.64x"] and count["UBLKCP"]
        assert code.registers * kernel.threads <= 65536 and code.registers in (128, 168)  # exchanged from there
    else:
        assert count["HMMA.16816"] and code.registers <= 128
