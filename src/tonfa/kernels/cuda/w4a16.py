"""w4a16: 4-bit linears with 16-bit activations for the modulations (device/w4a16.cu), from the canonical layout.

One launch takes any linears that read the same x; where their weights are is a kernel parameter, so that nothing is
copied and a group's results are those of its linears alone, bit for bit. Weights are read once for four rows of x.

All 76 modulations of FLUX.1 are 1.61 GB of codes and 0.20 GB of scales and zeros: 0.42 ms at an H200's 4.28 TB/s, next
to about 0.2 ms of instructions. 18432 x 3072 alone, 31.9 MB: 34 us at an RTX 3090's 936 GB/s.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.formats import GROUP_SIZE
from tonfa.kernels.cuda.contract import aligned, check_weight_dtype, padded, round_up
from tonfa.kernels.cuda.kernel import Kernel, Struct, specialize
from tonfa.kernels.cuda.launch import launch
from tonfa.weights import W4A16Weights

_THREADS = 128
_COLUMNS = 128
"""Output channels of a block."""
_COLUMN_MULTIPLE = 4
_PIECE = 128
_ROWS = 4
"""Of x, to a block."""
_LINEARS = 80
"""To a launch: what 4 KB of parameters hold."""
_MOST_BATCH = 65535
_MOST_SHARED = 96 << 10


class W4A16Linear(Struct):
    """One linear of a launch."""

    _fields_ = [  # noqa: RUF012
        ("qweight", c_void_p),
        ("wscales", c_void_p),
        ("wzeros", c_void_p),
        ("bias", c_void_p),
        ("columns", c_int32),
        ("first_block", c_int32),
        ("first_column", c_int32),
    ]


class W4A16(Struct):
    """What the kernel takes."""

    _fields_ = [  # noqa: RUF012
        ("x", c_void_p),
        ("out", c_void_p),
        ("batch", c_int32),
        ("rows", c_int32),
        ("channels", c_int32),
        ("count", c_int32),
        ("linears", W4A16Linear * _LINEARS),
    ]


@dataclass(frozen=True)
class PackedW4A16:
    """The canonical tensors, uncopied where N is a multiple of 4."""

    qweight: Tensor  # (N rounded up to 4, K/2) uint8
    wscales: Tensor  # (K/G, N rounded up to 4) 16-bit
    wzeros: Tensor  # (K/G, N rounded up to 4) 16-bit
    bias: Tensor  # (N rounded up to 4,) 16-bit
    out_features: int


def pack_w4a16(w: W4A16Weights) -> PackedW4A16:
    """Pad what needs it. Raises UnsupportedError for other dtypes than bfloat16 and float16."""
    w.check("W4A16Weights")
    check_weight_dtype(w.wscales.dtype, "pack_w4a16")
    n, groups = round_up(w.out_features, _COLUMN_MULTIPLE), w.in_features // GROUP_SIZE
    scales, zeros = (padded(t, groups, n) for t in (w.wscales, w.wzeros))
    return PackedW4A16(padded(w.qweight, n, w.in_features // 2), scales, zeros, padded(w.bias, n), w.out_features)


def unpack_w4a16(w: PackedW4A16) -> W4A16Weights:
    """The inverse of `pack_w4a16`."""
    n = w.out_features
    return W4A16Weights(w.qweight[:n], w.wscales[:, :n], w.wzeros[:, :n], w.bias[:n])


@lru_cache(maxsize=64)
def kernel(dtype: torch.dtype, shared: int = 0) -> Kernel:
    """The kernel for inputs of this dtype; `shared` bytes hold a block's rows of x and the sums of their groups."""
    return replace(specialize("w4a16", _THREADS, W4A16, dtype=dtype), shared=shared)


def _shared_bytes(rows: int, channels: int) -> int:
    pieces = -(-channels // _PIECE)
    return 64 + pieces * (_PIECE // GROUP_SIZE * _ROWS * 4 + rows * _PIECE * 2)


def _check(x: Tensor, weights: Sequence[PackedW4A16]) -> None:
    channels, dtype, device = 2 * weights[0].qweight.shape[1], weights[0].wscales.dtype, weights[0].qweight.device
    for w in weights:
        if (2 * w.qweight.shape[1], w.wscales.dtype, w.qweight.device) != (channels, dtype, device):
            raise FormatError("w4a16: linears of one launch need the same in_features, dtype and device")
    if x.ndim != 2 or x.shape[1] != channels or x.shape[0] > _MOST_BATCH:
        found = tuple(x.shape)
        raise FormatError(f"w4a16: expected x of shape (B, {channels}) with B up to {_MOST_BATCH}, got {found}")
    if x.dtype != dtype or x.device != device:
        expected, place = f"{dtype} on {device}", f"{x.dtype} on {x.device}"
        raise FormatError(f"w4a16: expected {expected}, got {place}; convert it with .to()")
    if _shared_bytes(1, channels) > _MOST_SHARED:
        raise FormatError(f"w4a16: {channels} channels do not fit in shared memory; choose backend='reference'")


def _launch(x: Tensor, weights: Sequence[PackedW4A16]) -> list[Tensor]:
    batch, channels = x.shape
    linears, block, column = (W4A16Linear * _LINEARS)(), 0, 0
    for i, w in enumerate(weights):
        tensors, n = (w.qweight, w.wscales, w.wzeros, w.bias), w.bias.shape[0]
        linears[i] = W4A16Linear(*(t.data_ptr() for t in tensors), n, block, column)
        block, column = block + -(-n // _COLUMNS), column + n
    rows = min(batch, _ROWS)
    while _shared_bytes(rows, channels) > _MOST_SHARED:
        rows -= 1
    out = torch.empty(batch * column, dtype=x.dtype, device=x.device)
    parameters = W4A16(x.data_ptr(), out.data_ptr(), batch, rows, channels, len(weights), linears)
    chosen = kernel(x.dtype, _shared_bytes(rows, channels))
    launch(chosen, x.device, (block, -(-batch // rows)), parameters)
    parts = out.split([batch * w.bias.shape[0] for w in weights])
    return [y.view(batch, -1)[:, : w.out_features] for y, w in zip(parts, weights, strict=True)]


def w4a16_group(
    x: Tensor,  # (B, K) bf16 or fp16
    weights: Sequence[PackedW4A16],
) -> tuple[Tensor, ...]:
    """(B, N) of x's dtype for each of the linears."""
    if not weights:
        return ()
    _check(x, weights)
    if not x.shape[0]:
        return tuple(x.new_empty((0, w.out_features)) for w in weights)
    x, found = aligned(x), list[Tensor]()
    for start in range(0, len(weights), _LINEARS):
        found += _launch(x, weights[start : start + _LINEARS])
    return tuple(found)


def w4a16(
    x: Tensor,  # (B, K) bf16 or fp16
    w: PackedW4A16,
) -> Tensor:
    """(B, N) of x's dtype."""
    return w4a16_group(x, (w,))[0].contiguous()
