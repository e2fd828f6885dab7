"""quantize and norm_modulate_quantize: e4m3 rows with the low-rank down-projection, in one kernel (device/quantize.cu).

4608 x 3072 at rank 32: 28 MB in, 14 MB out, 10 us at 4.28 TB/s; proj_down is read by every block of 16 rows, 56 MB from
L2. About 15 instructions an element bound it: LayerNorm, modulation and rounding pass over shared memory twice.
"""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.cuda.contract import round_up
from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.hopper.activation import HopperActivation
from tonfa.kernels.hopper.layout import ROW_BYTES, ROW_MULTIPLE
from tonfa.ops.activation import InputWeights
from tonfa.ops.fused import norm_modulate
from tonfa.ops.quantize import check_input

RANK_STEP = 16
LARGEST_RANK = 256
_THREADS = 256
_TILE_SHARED = 32 << 10  # a tile of 128 channels of 16 rows for each of 8 warps
_LARGEST_SHARED = 224 << 10
_AHEAD = 3  # tiles in shared memory where the scale is known


class Quantize(Struct):
    """The kernel's parameter."""

    _fields_ = [  # noqa: RUF012
        *(
            (name, c_void_p)
            for name in (
                "x",
                "scale",
                "shift",
                "inverse",
                "down",
                "absmax",
                "codes",
                "x_scale",
                "lora",
                "partial",
                "arrived",
            )
        ),
        ("batch_stride", c_int64),
        ("row_stride", c_int64),
        *((name, c_int32) for name in ("m", "m_pad", "k", "rank", "length", "modulation_stride")),
    ]


@dataclass(frozen=True, eq=False)
class PackedInput:
    """`InputWeights` as the kernel reads them."""

    inverse: Tensor  # (K,) float32, 1 / smooth_factor
    down: Tensor  # (R, K) 16-bit
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        """K."""
        return self.inverse.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]


def takes(dtype: torch.dtype, rank: int) -> bool:
    """Whether this backend's kernels compute in this dtype with a branch of this rank."""
    return dtype in (torch.bfloat16, torch.float16) and rank % RANK_STEP == 0 and rank <= LARGEST_RANK


def pack_input(w: InputWeights) -> PackedInput:
    """Transpose proj_down, invert smooth_factor."""
    return PackedInput(
        w.smooth_factor.detach().float().reciprocal(), w.proj_down.detach().t().contiguous(), w.proj_down.dtype
    )


def _tiles_a_warp(channels: int) -> int:
    return -(-channels // (8 * ROW_BYTES))


def _stays(channels: int) -> bool:
    """Whether rows of so many channels fit in shared memory, to be passed over several times."""
    return _tiles_a_warp(channels) * _TILE_SHARED <= _LARGEST_SHARED


@lru_cache(maxsize=64)
def kernel(dtype: torch.dtype, rank: int, norm: bool, known: bool, channels: int) -> Kernel:
    """The kernel for inputs of this dtype."""
    blocks = next(blocks for blocks in (4, 8, 16, 32) if rank <= 8 * blocks)
    groups = 4 if known else 1
    tiles = _AHEAD if known else _tiles_a_warp(channels)
    shared = max(tiles * _TILE_SHARED, 8 * 16 * (8 * blocks + 1) * 4)
    values = {"NORM": norm, "KNOWN": known, "GROUPS": groups, "RANK_BLOCKS": blocks, "FP16": dtype == torch.float16}
    defines = tuple((name, str(int(value))) for name, value in values.items())
    return Kernel("quantize", defines, (Quantize,), _THREADS, shared, "tonfa.kernels.hopper", "a")


def _rows(x: Tensor, w: PackedInput, what: str) -> Tensor:
    """(B, L, K) whose rows the kernel can read where they are."""
    check_input(x, w.inverse)
    if x.dtype != w.dtype:
        raise FormatError(f"{what}: the input is {x.dtype}, the weights are {w.dtype}; convert one of them")
    if x.ndim != 3:
        x = x.reshape(1, -1, x.shape[-1])
    readable = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if readable else x.contiguous()


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """How many blocks of a kernel run at a time, at least."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=1024)
def _splits(blocks: int, tiles: int, processors: int) -> int:
    """In how many parts the channels are dealt out: the fewest turns of the two warps that share rows."""

    def turns(splits: int) -> tuple[int, int]:
        waves = -(-blocks * splits // (2 * processors))
        return waves * -(-tiles // (2 * splits)), splits

    return min(range(1, max(1, min(tiles // 2, 16)) + 1), key=turns)


def empty_activation(rows: int, w: PackedInput, dtype: torch.dtype, device: torch.device) -> HopperActivation:
    """Memory for so many rows of a quantized input."""
    padded, steps = round_up(rows, ROW_MULTIPLE), -(-w.channels // ROW_BYTES)
    codes = torch.empty((steps, padded, ROW_BYTES), dtype=torch.uint8, device=device)
    scales = torch.empty(padded, device=device)[:rows]
    lowrank = torch.empty((-(-w.rank // 64), padded, 64), dtype=torch.bfloat16, device=device)
    return HopperActivation(codes, scales, lowrank, dtype, rows, w.channels, 0, w.rank)


def _run(
    x: Tensor, w: PackedInput, scale: Tensor | None, shift: Tensor | None, absmax: Tensor | None
) -> HopperActivation:
    (batch, length, k), device = x.shape, x.device
    m, tiles = batch * length, -(-k // ROW_BYTES)
    m_pad = round_up(m, ROW_MULTIPLE)
    out = empty_activation(m, w, x.dtype, device)
    if m == 0:
        return out
    known = absmax is not None
    chosen = kernel(x.dtype, w.rank, scale is not None, known, k)
    rows = 64 if known else 16
    blocks, splits = -(-m_pad // rows), 1
    partial = arrived = None
    if known:
        splits = _splits(blocks, tiles, multiprocessors(device))
        partial = torch.empty((splits, m_pad, max(w.rank, 1)), device=device)
        arrived = torch.zeros(blocks, dtype=torch.int32, device=device)
    parameters = Quantize(
        x.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if shift is None else shift.data_ptr(),
        w.inverse.data_ptr(),
        w.down.data_ptr(),
        None if absmax is None else absmax.data_ptr(),
        out.codes.data_ptr(),
        out.scales.data_ptr(),
        out.lowrank.data_ptr(),
        None if partial is None else partial.data_ptr(),
        None if arrived is None else arrived.data_ptr(),
        x.stride(0),
        x.stride(1),
        m,
        m_pad,
        k,
        w.rank,
        length,
        0 if scale is None else scale.stride(0),
    )
    launch(chosen, device, (blocks, splits), parameters)
    return out


def quantize(
    x: Tensor,  # (..., K) bf16 or fp16
    w: PackedInput,
) -> HopperActivation:
    """Codes, scales and lowrank of the smoothed input."""
    x = _rows(x, w, "quantize")
    if not _stays(w.channels):
        largest = (x.float() * w.inverse).abs().amax(2).flatten()
        return _run(x, w, None, None, largest)
    return _run(x, w, None, None, None)


def quantize_known(
    x: Tensor,  # (M, K)
    w: PackedInput,
    absmax: Tensor,  # (M,) float32: largest |x / smooth_factor| of each row
) -> HopperActivation:
    """The same, with the row's largest magnitude known already."""
    return _run(_rows(x, w, "quantize"), w, None, None, absmax)


def norm_modulate_quantize(
    x: Tensor,  # (B, L, K)
    scale: Tensor,  # (B, K), holds the 1 of "1 + scale"
    shift: Tensor,  # (B, K)
    w: PackedInput,
) -> HopperActivation:
    """LayerNorm, modulation and quantization of the next input."""
    if not _stays(w.channels):
        return quantize(norm_modulate(x, scale, shift), w)
    x = _rows(x, w, "norm_modulate_quantize")
    aligned = scale.stride() == shift.stride() and scale.stride(1) == 1 and scale.stride(0) % 8 == 0
    if not (aligned and scale.data_ptr() % 16 == shift.data_ptr() % 16 == 0):
        scale, shift = scale.contiguous(), shift.contiguous()
    return _run(x, w, scale.to(x.dtype), shift.to(x.dtype), None)
