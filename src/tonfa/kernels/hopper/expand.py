"""expand: 4-bit weights to e4m3 in the layout that the product reads, the values that it would decode itself.

9216 x 3072: 16 MB in and 28 MB out, 10 us at 4.28 TB/s, less where what is written stays in L2: all layers write to the
same buffer.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.hopper.layout import ROW_BYTES

_CHANNELS = 64  # of a block
_BLOCKS = 132 * 6  # as many as run at a time


class Expand(Struct):
    """The kernel's parameter."""

    _fields_ = [  # noqa: RUF012
        *((name, c_void_p) for name in ("qweight", "w_scales", "w_inverse", "out")),
        *((name, c_int32) for name in ("n", "k", "scales_fp16", "beside")),
    ]


@lru_cache(maxsize=1)
def kernel() -> Kernel:
    """The only one."""
    return Kernel("expand", (), (Expand,), 256, 0, "tonfa.kernels.hopper", "a", early=True)


def wide_shape(columns: int, channels: int) -> tuple[int, int, int]:
    """Of the expanded weights of a layer: steps of 128 input channels, output channels, bytes."""
    return -(-channels // ROW_BYTES), columns, ROW_BYTES


def expand(
    qweight: Tensor,  # (N, K/2) uint8, N a multiple of 64
    wscales: Tensor,  # (K/G, N)
    inverse_scales: Tensor,  # (N,) float32
    out: Tensor,  # wide_shape(N, K) uint8
    beside: bool = False,
) -> None:
    """Write e4m3(code * wscale * inverse_scale) to `out`, zeros beyond the last channel.

    `beside`: the kernel in front has nothing to do with these tensors and waited for what is in front of it, so that
    this one need not wait.
    """
    n, k = qweight.shape[0], qweight.shape[1] * 2
    parameters = Expand(
        qweight.data_ptr(),
        wscales.data_ptr(),
        inverse_scales.data_ptr(),
        out.data_ptr(),
        n,
        k,
        int(wscales.dtype == torch.float16),
        int(beside),
    )
    rows, steps = -(-n // _CHANNELS), -(-k // ROW_BYTES)
    each = -(-steps // max(1, _BLOCKS // rows))
    launch(kernel(), qweight.device, (rows, -(-steps // each)), parameters)
