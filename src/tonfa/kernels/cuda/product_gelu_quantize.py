"""product_gelu_quantize: GELU and the next quantization in the product's epilogue (device/product_gelu_quantize.cu).

Each block computes a few neighboring tiles of a row of tiles, a slice, and adds up their share of the next layer's
low-rank input; add_partials.cu adds the slices in order. 4608 x 12288 at rank 32 on 82 processors: 48 slices of 0.6 MB.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from functools import lru_cache

import torch

from tonfa.errors import FormatError
from tonfa.kernels.cuda.kernel import Kernel, Struct, specialize
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.cuda.product import THREADS, PackedProduct, Product, product_struct, tile_grid
from tonfa.kernels.cuda.quantize import CodeOutput, PackedInput, code_output, empty_activation
from tonfa.ops.activation import QuantizedActivation

_BLOCKS_PER_PROCESSOR = 2
_PARTIAL_COST = 0.2
"""Time of writing and adding a tile's partial sums at rank 32, in units of a tile's product over 3072 channels."""
_ADD_THREADS = 128


class Following(Struct):
    """The next layer's input and what quantizing it needs."""

    _fields_ = [  # noqa: RUF012
        ("out", CodeOutput),
        ("smooth", c_void_p),
        ("proj_down", c_void_p),
        ("partial", c_void_p),
        ("rank", c_int32),
        ("tiles", c_int32),
    ]


class Partials(Struct):
    """What add_partials adds."""

    _fields_ = [("partial", c_void_p), ("sum", c_void_p), ("count", c_int32), ("slices", c_int32)]  # noqa: RUF012


@lru_cache(maxsize=8)
def kernel(dtype: torch.dtype, unsigned: bool, following_unsigned: bool) -> Kernel:
    """The kernel for inputs of this dtype."""
    values = {"unsigned": unsigned, "following_unsigned": following_unsigned}
    return specialize("product_gelu_quantize", THREADS, Product, Following, dtype=dtype, **values)


@lru_cache(maxsize=1)
def add_kernel() -> Kernel:
    """The sum over slices."""
    return specialize("add_partials", _ADD_THREADS, Partials)


def tiles_of_slice(tiles_m: int, tiles_n: int, processors: int) -> int:
    """Tiles that a block computes: few leave many partial sums to add, many leave processors idle at the end."""
    together = _BLOCKS_PER_PROCESSOR * processors

    def cost(tiles: int) -> float:
        waves = -(-tiles_m * -(-tiles_n // tiles) // together)
        return waves * tiles * (1 + _PARTIAL_COST / tiles)

    return min((1, 2, 4, 8), key=cost)


def product_gelu_quantize(
    x: QuantizedActivation,  # M rows
    w: PackedProduct,
    following: PackedInput,
) -> QuantizedActivation:
    """The next layer's input: codes (M, N/2) uint8, scales (M, N/G), lowrank (M, R) float32."""
    parameters, kept = product_struct(x, w)
    down = following.proj_down
    if (following.channels, down.dtype, down.device) != (w.out_features, x.dtype, kept.device):
        expected = f"{w.out_features} channels of {x.dtype} on {kept.device}"
        found = f"{following.channels} of {down.dtype} on {down.device}"
        raise FormatError(f"product_gelu_quantize: the next layer must take {expected}, it takes {found}; convert it")
    rows, device, rank = x.codes.shape[0], kept.device, following.padded_rank
    out = empty_activation(rows, following)
    if rows == 0:
        return out
    assert out.lowrank is not None
    height, tiles_n, bands = tile_grid(rows, w.columns)
    tiles = tiles_of_slice(height * bands, tiles_n, torch.cuda.get_device_properties(device).multi_processor_count)
    slices = -(-tiles_n // tiles)
    partial = torch.empty((slices, rows, rank), device=device) if slices > 1 else out.lowrank
    pointers = (following.smooth.data_ptr(), following.proj_down.data_ptr(), partial.data_ptr())
    epilogue = Following(code_output(out), *pointers, rank, tiles)
    chosen = kernel(x.dtype, w.unsigned, following.unsigned)
    launch(chosen, device, (height, slices, bands), parameters, epilogue)
    if slices > 1 and rank:
        count = rows * rank // 4
        sums = Partials(partial.data_ptr(), out.lowrank.data_ptr(), count, slices)
        launch(add_kernel(), device, (-(-count // _ADD_THREADS),), sums)
    return out
