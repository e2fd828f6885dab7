"""The Hopper kernels compile without a GPU, and their machine code holds what they are written for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import machine_code
from tonfa.kernels.cuda.kernel import Kernel
from tonfa.kernels.hopper import attention_center, product_kernel, quantize, quantize_known
from tonfa.kernels.hopper.product_kernel import GATE_RESIDUAL, GELU, GELU_QUANTIZE, NORM_ROPE, NORM_ROPE_FP8, PLAIN

KERNELS = [
    product_kernel.kernel(torch.bfloat16, PLAIN, 256),
    product_kernel.kernel(torch.bfloat16, GELU, 192),
    product_kernel.kernel(torch.bfloat16, GATE_RESIDUAL, 224),
    product_kernel.kernel(torch.bfloat16, NORM_ROPE, 192),
    product_kernel.kernel(torch.bfloat16, NORM_ROPE_FP8, 192),
    product_kernel.kernel(torch.float16, NORM_ROPE_FP8, 32),
    product_kernel.kernel(torch.float16, PLAIN, 128),
    product_kernel.kernel(torch.bfloat16, GELU_QUANTIZE, 192, 32),
    product_kernel.kernel(torch.float16, GELU_QUANTIZE, 192, 0),
    product_kernel.kernel(torch.bfloat16, PLAIN, 256, cluster=2),
    product_kernel.kernel(torch.bfloat16, GELU, 192, cluster=2),
    product_kernel.kernel(torch.bfloat16, GATE_RESIDUAL, 224, cluster=2),
    product_kernel.kernel(torch.bfloat16, GATE_RESIDUAL, 176, cluster=2),
    product_kernel.kernel(torch.bfloat16, GATE_RESIDUAL, 112, cluster=2),
    product_kernel.kernel(torch.bfloat16, NORM_ROPE, 192, cluster=2),
    product_kernel.kernel(torch.bfloat16, NORM_ROPE_FP8, 160, cluster=2),
    product_kernel.kernel(torch.bfloat16, GELU_QUANTIZE, 192, 32, 2),
    product_kernel.kernel(torch.float16, GELU_QUANTIZE, 64, 64, 2),
    *(quantize.kernel(torch.bfloat16, norm, 3072, rows) for norm in (True, False) for rows in (35, 32, 24, 16, 4)),
    *(quantize.kernel(torch.float16, True, *shape) for shape in ((64, 35), (3072, 35), (5120, 21), (8192, 12))),
    *(quantize.kernel(dtype, False, 3072, rows, True) for dtype in (torch.bfloat16, torch.float16) for rows in (35, 4)),
    quantize.kernel(torch.bfloat16, False, 8192, 12, True),
    quantize_known.kernel(torch.bfloat16, 32),
    attention_center.kernel(torch.bfloat16, 3072),
    attention_center.kernel(torch.float16, 64),
]


pytestmark = machine_code.NEEDED


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_kernel(kernel: Kernel, tmp_path: Path) -> None:
    code = machine_code.read(kernel, 90, tmp_path)
    count = {
        kind: sum(n for name, n in code.instructions.items() if name.startswith(kind))
        for kind in ("QGMMA.64x", "HMMA.16816", "UBLKCP", "UCGABAR", "MEMBAR.ALL.GPU", "CCTL.IVALL", "WARPGROUP.DEPBAR")
    }
    multicast = sum(n for name, n in code.instructions.items() if name.startswith("UBLKCP") and "MULTICAST" in name)
    assert code.stack <= (0 if kernel.name == "quantize" else 32), "registers are spilled"
    if kernel.name == "product":
        assert count["QGMMA.64x"] % 4 == 0 and count["QGMMA.64x"] and count["UBLKCP"]
        assert code.registers * kernel.threads <= 65536 and code.registers in (128, 168)  # exchanged from there
        # Those that are written, copies of the loop among them. More where the assembler serializes the products.
        assert count["WARPGROUP.DEPBAR"] == (11 if int(dict(kernel.defines).get("DOWN_RANK", 0)) else 6)
        # Memory is not flushed for the other block in each step, nor L1 emptied but once, when the blocks meet.
        clusters = kernel.cluster > 1
        assert (multicast > 0, count["UCGABAR"]) == ((True, 2) if clusters else (False, 0))
        assert not count["MEMBAR.ALL.GPU"] and count["CCTL.IVALL"] <= clusters
    elif kernel.name == "quantize":
        assert count["HMMA.16816"] and count["UBLKCP"] and code.registers <= 168
        assert code.shared + kernel.shared <= 228 << 10  # with 1 KB that is not the kernel's
    elif kernel.name == "quantize_known":
        assert count["HMMA.16816"] and code.registers <= 128
    else:
        assert count["HMMA.16816"] and code.registers <= 80 and not code.stack  # two blocks of a multiprocessor
