"""quantize and norm_modulate_quantize: e4m3 rows with the low-rank down-projection, in one kernel (device/quantize.cu).

4608 x 3072 at rank 32: 28 MB in, 14 MB out, 10 us at 4.28 TB/s. A block of 12 warps for each multiprocessor: its 35
rows of 6 KB are all in shared memory, so there is one wave, every copy is under way from the start, and proj_down is
read 132 times (25 MB from L2) rather than once for 16 rows (56 MB). Until the codes a row is one warp's: no warp waits
for another, only for rows to arrive, and its sums are taken of whole rows once.

Instructions for an element with LayerNorm, a lane's, counted in the machine code: 3.5 for the sums, 9.0 for y, its
maximum and its norm, since a warp's three rows share the reading and unpacking of weights (11.3 in a row alone), 5.6
for codes and lora; and about 140 a lane for each row. In every issue slot of a multiprocessor that is 35 x 3072 x 19.6
/ 128 cycles, 10 us at 1.7 GHz. Measured on an H200: 22.7 us, from e4m3 15.7; a scheduler issues in 46 % of its cycles,
since its three warps wait for memory and for their own results.
"""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.cuda.contract import aligned, expect
from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.hopper.activation import HopperActivation, empty_activation
from tonfa.kernels.hopper.device_facts import multiprocessors
from tonfa.kernels.hopper.inputs import LARGEST_CHANNELS, PackedInput, rows_of
from tonfa.kernels.hopper.quantize_known import quantize_known
from tonfa.ops.activation import ScaledFP8
from tonfa.ops.fused import norm_modulate

_WARPS = 12
_ROWS = 40  # of a block at most: what the sums of a warp leave room for in registers
_SHARED = 225 << 10  # of the 227 KB that a block may have; the rest is declared in the kernel
_RANKS = 32  # of a warp


class Quantize(Struct):
    """The kernel's parameter."""

    _fields_ = [  # noqa: RUF012
        *(
            (name, c_void_p)
            for name in ("x", "unit", "scale", "shift", "inverse", "down", "codes", "x_scale", "norms", "lora")
        ),
        ("batch_stride", c_int64),
        ("row_stride", c_int64),
        *((name, c_int32) for name in ("m", "m_pad", "rank", "length", "modulation_stride", "rows", "rank_parts")),
    ]


def _shared_bytes(channels: int, rows: int) -> int:
    """The inverse of smooth_factor and the rows, in whose place the warps' sums are added up."""
    return max(4 * channels + rows * (2 * channels + 64), _WARPS * -(-rows // 8) * 8 * (_RANKS + 4) * 4)


@lru_cache(maxsize=256)
def rows_of_block(rows: int, channels: int, processors: int) -> int:
    """As few waves as shared memory allows, all alike."""
    largest = min(_ROWS, (_SHARED - 4 * channels) // (2 * channels + 64))
    waves = -(-rows // (largest * processors))
    return -(-rows // (waves * processors))


def rank_parts(rank: int) -> int:
    """How many warps share a tile of 128 channels, each with 32 ranks; it divides their number."""
    return next(parts for parts in (1, 2, 3, 4, 6, 12) if rank <= parts * _RANKS)


@lru_cache(maxsize=64)
def kernel(dtype: torch.dtype, norm: bool, channels: int, rows: int, from_fp8: bool = False) -> Kernel:
    """The kernel for rows of so many channels, for blocks of so many rows."""
    blocks = -(-rows // 8)
    values = {
        "NORM": norm,
        "FROM_FP8": from_fp8,
        "CHANNELS": channels,
        "ROW_BLOCKS": blocks,
        "FP16": dtype == torch.float16,
    }
    defines = tuple((name, str(int(value))) for name, value in values.items())
    shared = min(_shared_bytes(channels, 8 * blocks), _SHARED)
    return Kernel("quantize", defines, (Quantize,), 32 * _WARPS, shared, "tonfa.kernels.hopper", "a", early=True)


def _run(
    x: Tensor,  # (B, L, K)
    w: PackedInput,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    unit: Tensor | None = None,  # of x, if it is e4m3
) -> HopperActivation:
    (batch, length, k), device = x.shape, x.device
    m = batch * length
    norms = torch.empty(m, device=device)
    out = empty_activation(m, k, w.rank, w.dtype, device, norms)
    if m == 0:
        return out
    assert w.fragments is not None
    rows = rows_of_block(m, k, multiprocessors(device))
    parameters = Quantize(
        x=x.data_ptr(),
        unit=None if unit is None else unit.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        shift=None if shift is None else shift.data_ptr(),
        inverse=w.inverse.data_ptr(),
        down=w.fragments.data_ptr(),
        codes=out.codes.data_ptr(),
        x_scale=out.scales.data_ptr(),
        norms=norms.data_ptr(),
        lora=out.lowrank.data_ptr(),
        batch_stride=x.stride(0),
        row_stride=x.stride(1),
        m=m,
        m_pad=out.codes.shape[1],
        rank=w.rank,
        length=length,
        modulation_stride=0 if scale is None else scale.stride(0),
        rows=rows,
        rank_parts=rank_parts(w.rank),
    )
    launch(kernel(w.dtype, scale is not None, k, rows, unit is not None), device, (-(-m // rows),), parameters)
    return out


def quantize(
    x: Tensor,  # (..., K) bf16 or fp16
    w: PackedInput,
) -> HopperActivation:
    """Codes, scales, norms and lowrank of the smoothed input; no norms beyond LARGEST_CHANNELS."""
    x = rows_of(x, w, x.dtype, "quantize")
    if w.channels > LARGEST_CHANNELS:
        return quantize_known(x, w, (x.float() * w.inverse).abs().amax(2).flatten())
    return _run(x, w)


def quantize_fp8(
    x: ScaledFP8,  # (..., K)
    w: PackedInput,
) -> HopperActivation:
    """The same for e4m3 with one factor and a center, a power of two and of x's dtype; its bytes alone are read."""
    if w.channels > LARGEST_CHANNELS:
        return quantize(x.dequantize(), w)
    codes, center = rows_of(x.codes, w, x.dtype, "quantize_fp8"), aligned(x.center)
    expect("quantize_fp8: the center", center, (w.channels,), x.dtype, codes.device)
    return _run(codes, w, shift=center, unit=x.scale)


def norm_modulate_quantize(
    x: Tensor,  # (B, L, K)
    scale: Tensor,  # (B, K), holds the 1 of "1 + scale"
    shift: Tensor,  # (B, K)
    w: PackedInput,
) -> HopperActivation:
    """LayerNorm, modulation and quantization of the next input."""
    if x.ndim != 3:
        raise FormatError(f"norm_modulate_quantize: expected x of shape (B, L, K), got {tuple(x.shape)}")
    x = rows_of(x, w, x.dtype, "norm_modulate_quantize")
    for name, tensor in (("scale", scale), ("shift", shift)):
        expect(f"norm_modulate_quantize: {name}", tensor, (x.shape[0], w.channels), tensor.dtype, x.device)
    if w.channels > LARGEST_CHANNELS:
        return quantize(norm_modulate(x, scale, shift), w)
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    readable = scale.stride() == shift.stride() and scale.stride(1) == 1 and scale.stride(0) % 8 == 0
    if not (readable and scale.data_ptr() % 16 == shift.data_ptr() % 16 == 0):
        scale, shift = aligned(scale), aligned(shift)
    return _run(x, w, scale, shift)
