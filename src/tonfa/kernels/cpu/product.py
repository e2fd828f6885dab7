"""product: tiles of widened weights, an integer product each, and one pass that scales, adds and rounds.

For each tile of output channels: `widen` fills an INT8 buffer, `torch._int_mm` multiplies it with all rows, torch adds
up the low-rank branch, and the epilogue turns the int32 sums into the output's dtype, read once and written once.
Nothing of a layer but its 4-bit weights and one float32 scale and bias for each output channel is kept between calls.

3072 x 3072, rank 32, 512 rows, on two Zen 4 cores: widen 0.6 ms, integer product 11.9 ms, low rank 0.4 ms, epilogue
0.3 ms; the plain reference, which widens with torch, takes 144 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.formats import GELU_SHIFT
from tonfa.kernels.cpu import widen
from tonfa.kernels.cpu.scalar import claim, element_type, pointer, round_to, to_float
from tonfa.kernels.cpu.team import WORDS, compile_kernel, launch
from tonfa.kernels.cpu.w4a16 import pack_w4a16, w4a16
from tonfa.kernels.cpu.workspace import WORKSPACE
from tonfa.ops.activation import QuantizedActivation
from tonfa.weights import SVDQWeights, W4A16Weights

EXTRA = 11
"""Where an epilogue's own words begin, behind those that `run_tiles` passes to each."""

_TILE_BYTES = 16 << 20
_PACKED_ROWS = 128


@dataclass(frozen=True)
class PackedProduct:
    """The canonical tensors of a layer, uncopied, with what was computed from them when it was bound."""

    qweight: Tensor  # (N, K/2) uint8
    wscales: Tensor  # (K/G, N)
    row_scales: Tensor  # (N,) float32
    proj_up: Tensor  # (N, R)
    bias: Tensor  # (N,) float32


def _unshifted_bias(w: SVDQWeights) -> Tensor:
    """The bias of `SVDQWeights.unshifted`, float32 (N,), without the float32 copies of the weights it makes.

    The correction is a product with GELU_SHIFT / smooth_factor; biased by 8, the codes are those that w4a16 reads. Few
    rows at a time: copies of whole weights leave holes in the heap, 0.4 GiB over a FLUX transformer.
    """
    if not w.unsigned:
        return w.bias.float()
    shift = (GELU_SHIFT / w.smooth_factor.float()).unsqueeze(0)
    parts = []
    for n0 in range(0, w.out_features, _PACKED_ROWS):
        rows = slice(n0, n0 + _PACKED_ROWS)
        wscales = w.wscales[:, rows]
        part = W4A16Weights(w.qweight[rows] ^ 0x88, wscales, -8 * wscales, w.bias[rows])
        parts.append(w4a16(shift, pack_w4a16(part))[0])
    return torch.cat(parts)


def pack_product(w: SVDQWeights, levels: int | None = None) -> PackedProduct:
    """Row scales for integers up to `levels` (None: as large as this CPU multiplies exactly), a bias without shift."""
    w.check("SVDQWeights")
    qweight, wscales = w.qweight.contiguous(), w.wscales.contiguous()
    widen.kernel(wscales.dtype)
    scales = widen.row_scales(qweight, wscales, levels or widen.exact_levels())
    packed = PackedProduct(qweight, wscales, scales, w.proj_up.contiguous(), _unshifted_bias(w))
    kernel(w.proj_up.dtype, lowrank_dtype(w.proj_up.dtype, packed))
    return packed


def tile_columns(rows: int, columns: int, channels: int, multiple: int) -> int:
    """Output channels a tile: at most 16 MiB of widened weights and of sums, equal tiles, a multiple of `multiple`.

    512 rows of 3072 channels on two cores, quantization included: 14.3 ms with tiles of 768 columns, 13.9 with 1024,
    13.7 with one tile. 4608 rows on one core: 208 ms with 768 or 1024, 222 with one tile, for its 56 MB of sums.
    """
    most = max(min(_TILE_BYTES // channels, _TILE_BYTES // (4 * max(rows, 1))), multiple)
    each = -(-columns // -(-columns // most))
    return -(-each // multiple) * multiple


def run_tiles(
    x: QuantizedActivation,  # M rows
    w: PackedProduct,
    epilogue: Any,
    *extra: Tensor | int,
    multiple: int = 64,
) -> None:
    """Multiply, and launch `epilogue` on each tile of the int32 sums, a tile's width being a multiple of `multiple`.

    Its words: sums, row scales of x, row scales of w, lowrank, bias, columns, n0, N, then `extra`.
    """
    if x.lowrank is None or x.scales is None:
        raise ValueError("product: the input must come from this backend's quantize")
    (rows, channels), n = x.codes.shape, w.qweight.shape[0]
    if channels != 2 * w.qweight.shape[1]:
        raise FormatError(f"product: the input has {channels} channels, the weights have {2 * w.qweight.shape[1]}")
    if rows == 0:
        return
    native = lowrank_dtype(x.dtype, w) == torch.bfloat16
    lowrank, proj_up = (x.lowrank.bfloat16(), w.proj_up) if native else (x.lowrank, w.proj_up.float())
    step = min(tile_columns(rows, n, channels, multiple), n)
    for n0 in range(0, n, step):
        columns = min(step, n - n0)
        widened = WORKSPACE.empty("widened", columns, channels, torch.int8)
        sums = WORKSPACE.empty("sums", rows, columns, torch.int32)
        up = WORKSPACE.empty("up", rows, columns, proj_up.dtype)
        widen.widen(w.qweight, w.wscales, w.row_scales, n0, widened)
        torch._int_mm(x.codes, widened.t(), out=sums)
        torch.mm(lowrank, proj_up[n0 : n0 + columns].t(), out=up)
        words = (sums, x.scales, w.row_scales, up, w.bias, columns, n0, n)
        launch(epilogue, rows, columns, *words, *extra)


def lowrank_dtype(dtype: torch.dtype, w: PackedProduct) -> torch.dtype:
    """Of the low-rank branch: bf16 where input and weights are, else float32 (torch's float16 product is slow)."""
    return torch.bfloat16 if dtype == w.proj_up.dtype == torch.bfloat16 else torch.float32


@njit(error_model="numpy")
def tile_arrays(words: Any) -> Any:
    """sums (M, columns), row scales of x (M,), row scales of w (columns,) and bias (columns,) of an epilogue's tile."""
    a = carray(words, (WORDS,))
    rows, columns, n0, all_columns = a[1], a[8], a[9], a[10]
    sums = carray(pointer(a[3]), (rows, columns), np.int32)
    scales = carray(pointer(a[4]), (rows,), np.float32)
    wscales = carray(pointer(a[5]), (all_columns,), np.float32)[n0 : n0 + columns]
    bias = carray(pointer(a[7]), (all_columns,), np.float32)[n0 : n0 + columns]
    return sums, scales, wscales, bias


@njit(error_model="numpy")
def tile_value(integer: Any, scale: Any, wscale: Any, lowrank: Any, bias: Any) -> Any:
    """One output in float32."""
    return np.float32(integer) * scale * wscale + to_float(lowrank) + bias


@lru_cache(maxsize=8)
def kernel(dtype: torch.dtype, lowrank_dtype: torch.dtype) -> Any:
    """Scale, add, round. Extra word: out (M, N)."""
    element, lowrank_element = element_type(dtype), element_type(lowrank_dtype)

    def finish_rows(words: Any) -> None:
        a = carray(words, (WORDS,))
        rows, chunk, columns, n0 = a[1], a[2], a[8], a[9]
        lowrank = carray(pointer(a[6]), (rows, columns), lowrank_element)
        out = carray(pointer(a[EXTRA]), (rows, a[10]), element)
        sums, scales, wscales, bias = tile_arrays(words)
        start = claim(words, chunk)
        while start < rows:
            for m in range(start, min(start + chunk, rows)):
                scale, target = scales[m], out[m, n0 : n0 + columns]
                for n in range(columns):
                    y = tile_value(sums[m, n], scale, wscales[n], lowrank[m, n], bias[n])
                    target[n] = round_to(y, target[n])
            start = claim(words, chunk)

    return compile_kernel(finish_rows)


def product(
    x: QuantizedActivation,  # M rows
    w: PackedProduct,
) -> Tensor:
    """(M, N) of x's dtype."""
    out = torch.empty((x.codes.shape[0], w.qweight.shape[0]), dtype=x.dtype)
    run_tiles(x, w, kernel(x.dtype, lowrank_dtype(x.dtype, w)), out)
    return out
