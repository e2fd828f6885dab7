"""Every kernel that a FLUX model runs, for building them ahead of use and for tests of their machine code."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from tonfa.kernels.cuda import (
    norm_modulate_quantize,
    product,
    product_gate_residual,
    product_gelu_quantize,
    product_norm_rope,
    quantize,
    w4a16,
)
from tonfa.kernels.cuda.kernel import ELEMENTS, Kernel

RANK_CHUNKS = (32, 64)


def kernels(dtypes: Iterable[torch.dtype] = tuple(ELEMENTS)) -> list[Kernel]:
    """All specializations for these dtypes."""
    found = [product_gelu_quantize.add_kernel()]
    for dtype in dtypes:
        for chunk in RANK_CHUNKS:
            found += [quantize.kernel(dtype, unsigned, chunk) for unsigned in (False, True)]
            found.append(norm_modulate_quantize.kernel(dtype, False, chunk))
        for unsigned in (False, True):
            found += [product.kernel(dtype, unsigned), product_gate_residual.kernel(dtype, unsigned)]
        found.append(product_norm_rope.kernel(dtype, False))
        found.append(product_gelu_quantize.kernel(dtype, False, True))
        found.append(w4a16.kernel(dtype))
    return found
