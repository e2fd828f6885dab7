"""add_lowrank: partial sums of a down-projection to the `lowrank` of a quantized input (device/add_lowrank.cu).

4608 rows of rank 32 in 11 parts: 6.5 MB from L2, 2 us.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from functools import lru_cache

from torch import Tensor

from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.hopper.activation import HopperActivation

_THREADS = 256


class AddLowrank(Struct):
    """The kernel's parameter."""

    _fields_ = [  # noqa: RUF012
        *((name, c_void_p) for name in ("partial", "scale", "lora")),
        *((name, c_int32) for name in ("m", "m_pad", "rank", "parts")),
    ]


@lru_cache(maxsize=1)
def kernel() -> Kernel:
    """The only one."""
    return Kernel("add_lowrank", (), (AddLowrank,), _THREADS, 0, "tonfa.kernels.hopper", "a", early=True)


def add_lowrank(
    partial: Tensor,  # (parts, M padded, R) float32
    x: HopperActivation,  # scales written, lowrank to be
) -> None:
    """Write the sums over the parts, in their order, divided by the row's scale; zeros in the padding."""
    parts, padded, rank = partial.shape
    if not partial.numel():
        return
    parameters = AddLowrank(partial.data_ptr(), x.scales.data_ptr(), x.lowrank.data_ptr(), x.rows, padded, rank, parts)
    launch(kernel(), partial.device, (-(-padded * rank // (2 * _THREADS)),), parameters)
