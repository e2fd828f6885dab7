"""w4a16: a 4-bit linear with 16-bit activations for the modulations (device/w4a16.cu), from the canonical layout.

18432 x 3072 reads 28.3 MB of codes and 3.5 MB of scales and zeros once for each row of x: 34 us at an RTX 3090's
936 GB/s. Its 57 M codes take three instructions each, 10 us of that GPU's arithmetic.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from dataclasses import dataclass
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
_COLUMNS = 16
"""Output channels of a block."""
_COLUMN_MULTIPLE = 4
_MOST_ROWS = 65535


class W4A16(Struct):
    """What the kernel takes."""

    _fields_ = [  # noqa: RUF012
        ("x", c_void_p),
        ("qweight", c_void_p),
        ("wscales", c_void_p),
        ("wzeros", c_void_p),
        ("bias", c_void_p),
        ("out", c_void_p),
        ("columns", c_int32),
        ("channels", c_int32),
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


@lru_cache(maxsize=8)
def kernel(dtype: torch.dtype) -> Kernel:
    """The kernel for inputs of this dtype."""
    return specialize("w4a16", _THREADS, W4A16, dtype=dtype)


def w4a16(
    x: Tensor,  # (B, K) bf16 or fp16
    w: PackedW4A16,
) -> Tensor:
    """(B, N) of x's dtype."""
    n, channels = w.qweight.shape[0], 2 * w.qweight.shape[1]
    if x.ndim != 2 or x.shape[1] != channels or x.shape[0] > _MOST_ROWS:
        found = tuple(x.shape)
        raise FormatError(f"w4a16: expected x of shape (B, {channels}) with B up to {_MOST_ROWS}, got {found}")
    if x.dtype != w.wscales.dtype or x.device != w.qweight.device:
        expected, place = f"{w.wscales.dtype} on {w.qweight.device}", f"{x.dtype} on {x.device}"
        raise FormatError(f"w4a16: expected {expected}, got {place}; convert it with .to()")
    x = aligned(x)
    out = torch.empty((x.shape[0], n), dtype=x.dtype, device=x.device)
    if x.shape[0]:
        tensors = (x, w.qweight, w.wscales, w.wzeros, w.bias, out)
        parameters = W4A16(*(t.data_ptr() for t in tensors), n, channels)
        launch(kernel(x.dtype), x.device, (-(-n // _COLUMNS), x.shape[0]), parameters)
    return out[:, : w.out_features].contiguous()
