"""quantize where the kernel that wrote x has gathered its rows' largest magnitudes (device/quantize_known.cu).

4608 x 12288 at rank 32: 113 MB in, 57 MB out, 40 us at 4.28 TB/s; proj_down is read by every block of 64 rows.
"""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.hopper.activation import HopperActivation, empty_activation
from tonfa.kernels.hopper.device_facts import multiprocessors
from tonfa.kernels.hopper.inputs import PackedInput, rows_of
from tonfa.kernels.hopper.layout import ROW_BYTES

_THREADS = 256
_ROWS = 64  # of a block
_SHARED = 96 << 10  # three tiles of 128 channels of 16 rows for each of 8 warps


class QuantizeKnown(Struct):
    """The kernel's parameter."""

    _fields_ = [  # noqa: RUF012
        *(
            (name, c_void_p)
            for name in ("x", "inverse", "down", "absmax", "codes", "x_scale", "lora", "partial", "arrived")
        ),
        ("batch_stride", c_int64),
        ("row_stride", c_int64),
        *((name, c_int32) for name in ("m", "m_pad", "k", "rank", "length")),
    ]


@lru_cache(maxsize=16)
def kernel(dtype: torch.dtype, rank: int) -> Kernel:
    """The kernel for inputs of this dtype and branches of about this rank."""
    blocks = next(blocks for blocks in (4, 8, 16, 32) if rank <= 8 * blocks)
    shared = max(_SHARED, 2 * _ROWS * (8 * blocks + 1) * 4)
    defines = (("RANK_BLOCKS", str(blocks)), ("FP16", str(int(dtype == torch.float16))))
    return Kernel(
        "quantize_known", defines, (QuantizeKnown,), _THREADS, shared, "tonfa.kernels.hopper", "a", early=True
    )


@lru_cache(maxsize=1024)
def _splits(blocks: int, tiles: int, processors: int) -> int:
    """In how many parts the channels are dealt out: the fewest turns of the two warps that share rows."""

    def turns(splits: int) -> tuple[int, int]:
        waves = -(-blocks * splits // (2 * processors))
        return waves * -(-tiles // (2 * splits)), splits

    return min(range(1, max(1, min(tiles // 2, 16)) + 1), key=turns)


def zeros(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What the kernel that writes `rows` rows and this one count up from zero, of one fill: absmax, arrivals."""
    both = torch.zeros(rows + -(-rows // _ROWS), device=device)
    return both[:rows], both[rows:]


def quantize_known(
    x: Tensor,  # (M, K)
    w: PackedInput,
    absmax: Tensor,  # (M,) float32: largest |x / smooth_factor| of each row
    arrived: Tensor | None = None,  # (M/64,) 32-bit zeros, which stay zeros
) -> HopperActivation:
    """Codes, scales and lowrank of the smoothed input; no norms."""
    x = rows_of(x, w, x.dtype, "quantize")
    (batch, length, k), device = x.shape, x.device
    out = empty_activation(batch * length, k, w.rank, x.dtype, device)
    if out.rows == 0:
        return out
    m_pad = out.codes.shape[1]
    blocks, tiles = -(-m_pad // _ROWS), -(-k // ROW_BYTES)
    splits = _splits(blocks, tiles, multiprocessors(device))
    partial = torch.empty((splits, m_pad, max(w.rank, 1)), device=device)
    if arrived is None:
        arrived = torch.zeros(blocks, device=device)
    parameters = QuantizeKnown(
        x=x.data_ptr(),
        inverse=w.inverse.data_ptr(),
        down=w.down.data_ptr(),
        absmax=absmax.data_ptr(),
        codes=out.codes.data_ptr(),
        x_scale=out.scales.data_ptr(),
        lora=out.lowrank.data_ptr(),
        partial=partial.data_ptr(),
        arrived=arrived.data_ptr(),
        batch_stride=x.stride(0),
        row_stride=x.stride(1),
        m=out.rows,
        m_pad=m_pad,
        k=k,
        rank=w.rank,
        length=length,
    )
    launch(kernel(x.dtype, w.rank), device, (blocks, splits), parameters)
    return out
