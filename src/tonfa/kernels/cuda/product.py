"""product: the 4-bit product with its low-rank up-projection and bias (device/product.cuh, device/product.cu).

Weights are read in the canonical layout: there is no second copy of them. Only shapes that 16-byte words do not fit (N
no multiple of 8, R none of 16) are padded when a layer is bound.

For 64 channels of a tile of 128 x 128 outputs, each of the four warps issues 32 INT4 instructions (m16n8k64), 256 FFMA
and 114 others: 402 issue slots against 512 cycles of the tensor core on sm_86 and sm_89. docs/int4-performance.md says
what follows from that.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.errors import FormatError
from tonfa.formats import GROUP_SIZE
from tonfa.kernels.cuda.contract import aligned, check_operand, check_weight_dtype, padded, round_up
from tonfa.kernels.cuda.kernel import Kernel, Struct, specialize
from tonfa.kernels.cuda.launch import launch
from tonfa.ops.activation import QuantizedActivation
from tonfa.weights import SVDQWeights

TILE = 128
THREADS = 128
_BAND = 16
_RANK_MULTIPLE = 16
_COLUMN_MULTIPLE = 8


class Product(Struct):
    """What every kernel with a product takes."""

    _fields_ = [  # noqa: RUF012
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("lowrank", c_void_p),
        ("qweight", c_void_p),
        ("wscales", c_void_p),
        ("proj_up", c_void_p),
        ("bias", c_void_p),
        ("rows", c_int32),
        ("columns", c_int32),
        ("channels", c_int32),
        ("rank", c_int32),
        ("scale_stride", c_int32),
        ("lowrank_stride", c_int32),
    ]


class Output(Struct):
    """Where the plain product goes."""

    _fields_ = [("y", c_void_p)]  # noqa: RUF012


@dataclass(frozen=True)
class PackedProduct:
    """The canonical tensors, uncopied where N and R fit."""

    qweight: Tensor  # (N rounded up to 8, K/2) uint8
    wscales: Tensor  # (K/G, N rounded up to 8) 16-bit
    proj_up: Tensor  # (N rounded up to 8, R rounded up to 16) 16-bit
    bias: Tensor  # (N rounded up to 8,) 16-bit
    out_features: int
    rank: int
    unsigned: bool

    @property
    def channels(self) -> int:
        """K."""
        return 2 * self.qweight.shape[1]

    @property
    def columns(self) -> int:
        """N in memory."""
        return self.qweight.shape[0]


def pack_product(w: SVDQWeights) -> PackedProduct:
    """Pad what needs it. Raises UnsupportedError for other dtypes than bfloat16 and float16."""
    w.check("SVDQWeights")
    check_weight_dtype(w.wscales.dtype, "pack_product")
    n, rank = round_up(w.out_features, _COLUMN_MULTIPLE), round_up(w.rank, _RANK_MULTIPLE)
    check_operand("pack_product", n, w.in_features)
    return PackedProduct(
        padded(w.qweight, n, w.in_features // 2),
        padded(w.wscales, w.in_features // GROUP_SIZE, n),
        padded(w.proj_up, n, rank),
        padded(w.bias, n),
        w.out_features,
        w.rank,
        w.unsigned,
    )


def unpack_product(w: PackedProduct) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qweight, wscales, proj_up and bias as they were packed."""
    n = w.out_features
    return w.qweight[:n], w.wscales[:, :n], w.proj_up[:n, : w.rank], w.bias[:n]


def tile_grid(rows: int, columns: int) -> tuple[int, int, int]:
    """Blocks: tiles along M inside a band, tiles along N, bands of equal height (16 tiles at most)."""
    tiles = -(-rows // TILE)
    bands = -(-tiles // _BAND)
    return -(-tiles // bands), -(-columns // TILE), bands


def product_struct(x: QuantizedActivation, w: PackedProduct) -> tuple[Product, Tensor]:
    """The struct that every kernel with a product takes, and a tensor that must live until it was launched.

    Raises FormatError unless `x` is in the layout of this backend and fits the weights.
    """
    if x.scales is None or x.lowrank is None or x.codes.dtype != torch.uint8 or x.codes.ndim != 2:
        raise FormatError("product: the input must come from this backend's quantize")
    (rows, bytes_), stride = x.codes.shape, x.scales.stride(1)
    if 2 * bytes_ != w.channels or x.lowrank.shape != (rows, w.rank):
        found = f"{2 * bytes_} channels and lowrank of shape {tuple(x.lowrank.shape)}"
        raise FormatError(f"product: expected {w.channels} channels and lowrank ({rows}, {w.rank}), got {found}")
    if x.scales.shape != (rows, w.channels // GROUP_SIZE):
        expected = (rows, w.channels // GROUP_SIZE)
        raise FormatError(f"product: scales of shape {tuple(x.scales.shape)}, expected {expected}; quantize it anew")
    if x.lowrank.dtype != torch.float32:
        raise FormatError(f"product: lowrank is {x.lowrank.dtype}, expected torch.float32; convert it with .float()")
    if x.dtype != w.wscales.dtype or x.scales.dtype != x.dtype:
        raise FormatError(f"product: the input is {x.dtype}, the weights are {w.wscales.dtype}; convert one of them")
    for tensor in (x.codes, x.scales, x.lowrank):
        if tensor.device != w.qweight.device:
            raise FormatError(f"product: the input is on {tensor.device}, the weights are on {w.qweight.device}")
    by_group = (rows <= 1 or x.scales.stride(0) == 1) and stride % 8 == 0 and stride >= rows
    if rows and not (x.codes.is_contiguous() and by_group and x.scales.data_ptr() % 16 == 0):
        raise FormatError("product: the input must come from this backend's quantize; its layout is another one")
    check_operand("product", rows, w.channels)
    lowrank, rank = x.lowrank, w.proj_up.shape[1]
    if rank != w.rank or lowrank.stride(1) != 1 or lowrank.stride(0) % 4 or lowrank.data_ptr() % 16:
        lowrank = aligned(functional.pad(lowrank, (0, rank - w.rank)))
    tensors = (x.codes, x.scales, lowrank, w.qweight, w.wscales, w.proj_up, w.bias)
    pointers = (t.data_ptr() for t in tensors)
    return Product(*pointers, rows, w.columns, w.channels, rank, stride, lowrank.stride(0)), lowrank


@lru_cache(maxsize=8)
def kernel(dtype: torch.dtype, unsigned: bool) -> Kernel:
    """The kernel for inputs of this dtype."""
    return specialize("product", THREADS, Product, Output, dtype=dtype, unsigned=unsigned)


def product(
    x: QuantizedActivation,  # M rows
    w: PackedProduct,
) -> Tensor:
    """(M, N) of x's dtype."""
    parameters, kept = product_struct(x, w)
    y = torch.empty((x.codes.shape[0], w.columns), dtype=x.dtype, device=kept.device)
    if y.shape[0]:
        launch(kernel(x.dtype, w.unsigned), y.device, tile_grid(*y.shape), parameters, Output(y.data_ptr()))
    return y[:, : w.out_features].contiguous()
