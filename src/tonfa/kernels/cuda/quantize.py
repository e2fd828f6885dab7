"""quantize: 4-bit codes, scales and the low-rank down-projection in one pass over the input (device/quantize.cu).

Inside this backend codes are packed as `formats.GroupInt4.pack` packs them, and scales lie in memory by group, (K/G, M)
with rows that are padded to multiples of 8, so that the product copies both as they are.

4608 x 3072 at rank 32 moves 28.3 MB of input, 7.1 MB of codes, 0.4 MB of scales and 0.6 MB of lowrank, and reads 28 MB
of proj_down from L2.
"""

from __future__ import annotations

from ctypes import c_int32, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.formats import GROUP_SIZE, INT4, UINT4
from tonfa.kernels.cuda.contract import aligned, check_operand, check_weight_dtype, round_up
from tonfa.kernels.cuda.kernel import Kernel, Struct, specialize
from tonfa.kernels.cuda.launch import launch
from tonfa.ops.activation import InputWeights, QuantizedActivation
from tonfa.ops.quantize import check_input

ROWS = 32
"""Rows of a block."""
THREADS = 256
_RANK_MULTIPLE = 16
_SCALE_ROWS = 8


class CodeOutput(Struct):
    """Where codes and scales go."""

    _fields_ = [("codes", c_void_p), ("scales", c_void_p), ("channels", c_int32), ("scale_stride", c_int32)]  # noqa: RUF012


class Quantize(Struct):
    """What both quantizing kernels take."""

    _fields_ = [  # noqa: RUF012
        ("smooth", c_void_p),
        ("proj_down", c_void_p),
        ("lowrank", c_void_p),
        ("out", CodeOutput),
        ("rows", c_int32),
        ("rank", c_int32),
    ]


class Input(Struct):
    """What is quantized."""

    _fields_ = [("x", c_void_p)]  # noqa: RUF012


@dataclass(frozen=True)
class PackedInput:
    """`InputWeights` as the kernels read them."""

    smooth: Tensor  # (K, 2) float32: factor and reciprocal
    proj_down: Tensor  # (R rounded up to rank_chunk, at least once that, K) 16-bit
    rank: int
    unsigned: bool

    @property
    def channels(self) -> int:
        """K."""
        return self.smooth.shape[0]

    @property
    def padded_rank(self) -> int:
        """Columns of `lowrank` in memory."""
        return round_up(self.rank, _RANK_MULTIPLE)

    @property
    def rank_chunk(self) -> int:
        """Ranks that a block computes: more would not fit its registers."""
        return rank_chunk(self.padded_rank)


def rank_chunk(rank: int) -> int:
    """32 up to rank 32, else 64."""
    return 32 if rank <= 32 else 64


def pack_input(w: InputWeights) -> PackedInput:
    """Transpose proj_down, invert smooth_factor. Raises UnsupportedError for other dtypes than bfloat16 and float16."""
    check_weight_dtype(w.proj_down.dtype, "pack_input")
    channels, rank = w.proj_down.shape
    chunk = rank_chunk(round_up(rank, _RANK_MULTIPLE))
    down = w.proj_down.new_zeros(max(chunk, round_up(rank, chunk)), channels)  # rank 0: codes are written all the same
    down[:rank] = w.proj_down.detach().t()
    factor = w.smooth_factor.detach().float()
    return PackedInput(torch.stack((factor, factor.reciprocal()), dim=1), down, rank, w.unsigned)


def unpack_input(w: PackedInput) -> InputWeights:
    """The inverse of `pack_input`."""
    dtype = w.proj_down.dtype
    return InputWeights(w.smooth[:, 0].to(dtype), w.proj_down[: w.rank].t().contiguous(), w.unsigned, "int4")


def empty_activation(rows: int, w: PackedInput) -> QuantizedActivation:
    """Memory for an input of `rows` rows, in this backend's layout."""
    device, dtype = w.proj_down.device, w.proj_down.dtype
    codes = torch.empty((rows, w.channels // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((w.channels // GROUP_SIZE, round_up(rows, _SCALE_ROWS)), dtype=dtype, device=device)
    lowrank = torch.empty((rows, w.padded_rank), device=device)
    return QuantizedActivation(codes, scales[:, :rows].t(), lowrank[:, : w.rank], dtype)


def code_output(x: QuantizedActivation) -> CodeOutput:
    """The struct of `empty_activation`."""
    assert x.scales is not None
    return CodeOutput(x.codes.data_ptr(), x.scales.data_ptr(), 2 * x.codes.shape[1], x.scales.stride(1))


def pack_activation(x: QuantizedActivation) -> QuantizedActivation:
    """An input with unpacked codes, as the reference gives it, in this backend's layout."""
    assert x.scales is not None
    rows, groups = x.scales.shape
    scales = x.scales.new_zeros(groups, round_up(rows, _SCALE_ROWS))[:, :rows]
    scales.copy_(x.scales.t())
    return QuantizedActivation(INT4.pack(x.codes), scales.t(), x.lowrank, x.dtype)


def unpack_activation(x: QuantizedActivation, unsigned: bool) -> QuantizedActivation:
    """The inverse of `pack_activation`."""
    return QuantizedActivation((UINT4 if unsigned else INT4).unpack(x.codes), x.scales, x.lowrank, x.dtype)


def quantize_struct(x: QuantizedActivation, w: PackedInput) -> Quantize:
    """The struct that both quantizing kernels take."""
    assert x.lowrank is not None
    smooth, down, lowrank = w.smooth.data_ptr(), w.proj_down.data_ptr(), x.lowrank.data_ptr()
    return Quantize(smooth, down, lowrank, code_output(x), x.codes.shape[0], w.padded_rank)


def quantize_grid(rows: int, w: PackedInput) -> tuple[int, int]:
    """Blocks of both quantizing kernels."""
    return -(-rows // ROWS), w.proj_down.shape[0] // w.rank_chunk


def check_rows(x: Tensor, w: PackedInput, what: str) -> Tensor:
    """(M, K) contiguous and aligned. Raises FormatError for other channels, devices and dtypes."""
    check_input(x, w.smooth)
    if x.dtype != w.proj_down.dtype:
        raise FormatError(f"{what}: the input is {x.dtype}, the weights are {w.proj_down.dtype}; convert one of them")
    rows = aligned(x.reshape(-1, x.shape[-1]))
    check_operand(what, *rows.shape)
    return rows


@lru_cache(maxsize=32)
def kernel(dtype: torch.dtype, unsigned: bool, rank_chunk: int) -> Kernel:
    """The kernel for inputs of this dtype."""
    values = {"unsigned": unsigned, "rank_chunk": rank_chunk}
    return specialize("quantize", THREADS, Quantize, Input, dtype=dtype, **values)


def quantize(
    x: Tensor,  # (..., K) bf16 or fp16
    w: PackedInput,
) -> QuantizedActivation:
    """Codes (M, K/2) uint8, scales (M, K/G), lowrank (M, R) float32."""
    rows = check_rows(x, w, "quantize")
    out = empty_activation(rows.shape[0], w)
    if rows.shape[0]:
        chosen = kernel(x.dtype, w.unsigned, w.rank_chunk)
        parameters = (quantize_struct(out, w), Input(rows.data_ptr()))
        launch(chosen, x.device, quantize_grid(rows.shape[0], w), *parameters)
    return out
