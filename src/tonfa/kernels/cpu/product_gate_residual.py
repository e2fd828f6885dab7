"""product_gate_residual: gate and residual in the product's epilogue.

4096 rows, 12288 -> 3072 channels: 0.78 s on one Zen 4 core, the composition 0.81 s.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.cpu.product import EXTRA, PackedProduct, lowrank_dtype, run_tiles, tile_arrays, tile_value
from tonfa.kernels.cpu.scalar import claim, element_type, pointer, round_to, to_float
from tonfa.kernels.cpu.team import WORDS, compile_kernel
from tonfa.ops.activation import QuantizedActivation


@lru_cache(maxsize=8)
def kernel(dtype: torch.dtype, lowrank_dtype: torch.dtype) -> Any:
    """Scale, add, gate, add, round. Extra words: residual and out (M, N), gate (B, N) float32, L."""
    element, lowrank_element = element_type(dtype), element_type(lowrank_dtype)
    limit = np.float32(65504 if dtype == torch.float16 else np.inf)

    def finish_rows_gate(words: Any) -> None:
        a = carray(words, (WORDS,))
        rows, chunk, columns, n0, all_columns = a[1], a[2], a[8], a[9], a[10]
        length = a[EXTRA + 3]
        lowrank = carray(pointer(a[6]), (rows, columns), lowrank_element)
        residual = carray(pointer(a[EXTRA]), (rows, all_columns), element)
        out = carray(pointer(a[EXTRA + 1]), (rows, all_columns), element)
        gates = carray(pointer(a[EXTRA + 2]), (rows // length, all_columns), np.float32)
        sums, scales, wscales, bias = tile_arrays(words)
        start = claim(words, chunk)
        while start < rows:
            for m in range(start, min(start + chunk, rows)):
                scale, gate = scales[m], gates[m // length, n0 : n0 + columns]
                source, target = residual[m, n0 : n0 + columns], out[m, n0 : n0 + columns]
                for n in range(columns):
                    y = tile_value(sums[m, n], scale, wscales[n], lowrank[m, n], bias[n])
                    y = min(max(to_float(source[n]) + y * gate[n], -limit), limit)
                    target[n] = round_to(y, target[n])
            start = claim(words, chunk)

    return compile_kernel(finish_rows_gate)


def product_gate_residual(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    residual: Tensor,  # (B, L, N)
    gate: Tensor,  # (B, N)
) -> Tensor:
    """Residual + gate * product: (B, L, N) of the residual's dtype."""
    batch, length, n = residual.shape
    if (batch * length, n) != (x.codes.shape[0], w.qweight.shape[0]) or gate.shape != (batch, n):
        found = f"residual {tuple(residual.shape)}, gate {tuple(gate.shape)}"
        raise FormatError(f"product_gate_residual: {x.codes.shape[0]} rows of {w.qweight.shape[0]}, but {found}")
    out = torch.empty((batch, length, n), dtype=residual.dtype)
    finish = kernel(residual.dtype, lowrank_dtype(x.dtype, w))
    run_tiles(x, w, finish, residual.contiguous(), out, gate.float().contiguous(), length)
    return out
