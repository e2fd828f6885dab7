"""product: FP8 activations times 4-bit weights that are decoded in registers, with four epilogues (device/product.cu).

4608 x 9216 x 3072: 261 GFLOP, 190 us at the 1371 TFLOP/s of `torch._scaled_mm`; 14 MB of codes are read once, the
weights are never written in another form. The branch is one more step of 64 channels; smoothing has been done already.
"""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from tonfa.errors import FormatError, KernelError
from tonfa.formats import GROUP_SIZE, INT4
from tonfa.kernels.cuda.contract import aligned
from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.hopper import tiles
from tonfa.kernels.hopper.activation import HopperActivation
from tonfa.kernels.hopper.device_facts import multiprocessors
from tonfa.kernels.hopper.inputs import PackedInput
from tonfa.kernels.hopper.layout import pack_up
from tonfa.kernels.hopper.quantize import quantize
from tonfa.kernels.hopper.quantize_known import quantize_known, zeros
from tonfa.ops import fused
from tonfa.ops.activation import QuantizedActivation
from tonfa.ops.fused import Rotary
from tonfa.weights import SVDQWeights

PLAIN, GELU, GATE_RESIDUAL, NORM_ROPE = range(4)
HEAD_DIM = 128
_LARGEST = 448.0
_CHUNK = 1024  # rows whose residual is computed at a time
_THREADS = 384


class TensorMap(Struct):
    """A CUtensorMap."""

    _fields_ = [("opaque", c_uint64 * 16)]  # noqa: RUF012


class Product(Struct):
    """The kernel's parameter."""

    _fields_ = [  # noqa: RUF012
        *(
            (name, c_void_p)
            for name in (
                "x",
                "x_scale",
                "lora",
                "w_scales",
                "w_inverse",
                "w_scale",
                "up",
                "bias",
                "out",
                "out_k",
                "out_v",
                "residual",
                "gate",
                "norm_q",
                "norm_k",
                "rotary",
                "next_inverse",
                "absmax",
            )
        ),
        *((name, c_int64) for name in ("batch_stride", "token_stride", "head_stride")),
        *(
            (name, c_int32)
            for name in (
                "m",
                "m_pad",
                "n",
                "k",
                "rank",
                "rank_start",
                "length",
                "heads",
                "gate_stride",
                "scales_fp16",
            )
        ),
    ]


@dataclass(frozen=True)
class PackedProduct:
    """A layer's canonical tensors, uncopied if N is a multiple of 64, and what was computed from them at binding."""

    qweight: Tensor  # (columns, K/2) uint8
    wscales: Tensor  # (K/G, columns)
    row_scales: Tensor  # (columns,) float32
    inverse_scales: Tensor  # (N,) float32
    up: Tensor  # fragments of proj_up / row_scales
    bias: Tensor  # (N,) float32
    rank: int
    out_features: int
    map: TensorMap

    @property
    def columns(self) -> int:
        """N rounded up to a multiple of 64: what the tensors hold."""
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.qweight.shape[1] * 2


def _tensor_map(qweight: Tensor) -> TensorMap:
    """Boxes of 128 rows and 64 bytes, zeros outside."""
    from cuda.bindings import driver as d

    (rows, columns), u32, u64 = qweight.shape, d.cuuint32_t, d.cuuint64_t
    status, made = d.cuTensorMapEncodeTiled(
        d.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        2,
        qweight.data_ptr(),
        [u64(columns), u64(rows)],
        [u64(columns)],
        [u32(64), u32(tiles.CHANNELS)],
        [u32(1), u32(1)],
        d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_NONE,
        d.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status) != 0:
        raise KernelError(
            f"describing weights of shape {tuple(qweight.shape)} to the copy engine failed: {status.name}"
        )
    return TensorMap.from_buffer_copy((c_uint64 * 16).from_address(int(made.getPtr())))


def row_scales(w: SVDQWeights) -> Tensor:
    """(N,) float32: the largest |code * scale| of each output channel over 448; 1 where all are zero."""
    largest = torch.empty(w.out_features, device=w.qweight.device)
    for start in range(0, w.out_features, _CHUNK):
        codes = INT4.unpack(w.qweight[start : start + _CHUNK]).unflatten(1, (-1, GROUP_SIZE)).abs().amax(2)
        scales = w.wscales[:, start : start + _CHUNK].T.float().abs()
        largest[start : start + _CHUNK] = (codes * scales).amax(1)
    scales = largest * (1 / _LARGEST)
    return torch.where(scales > 0, scales, 1.0)


def _unshifted_bias(w: SVDQWeights) -> Tensor:
    """The bias of `SVDQWeights.unshifted`, by rows."""
    if not w.unsigned:
        return w.bias.detach().float()
    parts = []
    for start in range(0, w.out_features, _CHUNK):
        rows = slice(start, start + _CHUNK)
        piece = replace(
            w, qweight=w.qweight[rows], wscales=w.wscales[:, rows], proj_up=w.proj_up[rows], bias=w.bias[rows]
        )
        parts.append(piece.unshifted().bias.float())
    return torch.cat(parts)


def pack_product(w: SVDQWeights) -> PackedProduct:
    """Row scales, the branch in fragments, a bias without shift; the 4-bit codes stay as they are."""
    w.check("SVDQWeights")
    n = w.out_features
    missing = -n % GROUP_SIZE
    if missing:
        w = replace(
            w,
            qweight=functional.pad(w.qweight, (0, 0, 0, missing)),
            wscales=functional.pad(w.wscales, (0, missing)),
            proj_up=functional.pad(w.proj_up, (0, 0, 0, missing)),
            bias=functional.pad(w.bias, (0, missing)),
        )
    qweight, wscales, scales = aligned(w.qweight), aligned(w.wscales), row_scales(w)
    up = pack_up((w.proj_up.detach().float() / scales.unsqueeze(1)).to(torch.bfloat16))
    inverse, bias = scales.reciprocal(), _unshifted_bias(w)
    return PackedProduct(qweight, wscales, scales, inverse, up, bias, w.rank, n, _tensor_map(qweight))


@lru_cache(maxsize=64)
def kernel(dtype: torch.dtype, epilogue: int, tokens: int) -> Kernel:
    """The kernel with this epilogue, for tiles of so many rows."""
    from tonfa.kernels.hopper.wgmma import wrappers

    values = {
        "TOKENS": tokens,
        "STAGES": tiles.stages(tokens),
        "EPILOGUE": epilogue,
        "OUT_FP16": int(dtype == torch.float16),
    }
    defines = tuple((name, str(value)) for name, value in values.items())
    shared = tiles.shared_bytes(tokens)
    package = "tonfa.kernels.hopper"
    return Kernel("product", defines, (TensorMap, Product), _THREADS, shared, package, "a", wrappers(tokens))


def _run(x: QuantizedActivation, w: PackedProduct, epilogue: int, **values: Any) -> None:
    if not isinstance(x, HopperActivation) or x.scales is None or x.lowrank is None:
        raise FormatError("product: the input must come from this backend's quantize")
    if (x.channels, x.rank) != (w.in_features, w.rank):
        found, expected = f"{x.channels} channels of rank {x.rank}", f"{w.in_features} of rank {w.rank}"
        raise FormatError(f"product: the input has {found}, the weights have {expected}")
    if x.rows == 0:
        return
    device, n = x.codes.device, w.columns
    count = multiprocessors(device)
    tokens = tiles.choose(x.rows, n, count)
    parameters = Product(
        x=x.codes.data_ptr(),
        x_scale=x.scales.data_ptr(),
        lora=x.lowrank.data_ptr(),
        w_scales=w.wscales.data_ptr(),
        w_inverse=w.inverse_scales.data_ptr(),
        w_scale=w.row_scales.data_ptr(),
        up=w.up.data_ptr(),
        bias=w.bias.data_ptr(),
        m=x.rows,
        m_pad=x.codes.shape[1],
        n=n,
        k=x.channels,
        rank=x.rank,
        rank_start=x.rank_start,
        scales_fp16=int(w.wscales.dtype == torch.float16),
        **values,
    )
    blocks = min(count, -(-x.rows // tokens) * -(-n // tiles.CHANNELS))
    launch(kernel(x.dtype, epilogue, tokens), device, (blocks,), w.map, parameters)


def product(
    x: QuantizedActivation,  # M rows
    w: PackedProduct,
) -> Tensor:
    """(M, N) of x's dtype."""
    assert isinstance(x, HopperActivation)
    out = torch.empty((x.rows, w.columns), dtype=x.dtype, device=x.codes.device)
    _run(x, w, PLAIN, out=out.data_ptr())
    return out if w.columns == w.out_features else out[:, : w.out_features].contiguous()


class Primitives:
    """`ops.fused.Primitives` of this backend."""

    quantize = staticmethod(quantize)
    product = staticmethod(product)


def product_gelu_quantize(
    x: QuantizedActivation,  # M rows
    w: PackedProduct,
    following: PackedInput,
) -> QuantizedActivation:
    """The input of the next linear. The product gathers the rows' largest magnitudes, which the quantizer needs."""
    assert isinstance(x, HopperActivation)
    if following.channels != w.out_features:
        raise FormatError(f"product_gelu_quantize: {w.out_features} channels go to a linear of {following.channels}")
    if w.columns != w.out_features:
        return fused.product_gelu_quantize(Primitives, x, w, following)
    out = torch.empty((x.rows, w.out_features), dtype=x.dtype, device=x.codes.device)
    absmax, arrived = zeros(x.rows, x.codes.device)
    _run(x, w, GELU, out=out.data_ptr(), next_inverse=following.inverse.data_ptr(), absmax=absmax.data_ptr())
    return quantize_known(out, following, absmax, arrived)


def product_gate_residual(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    residual: Tensor,  # (B, L, N)
    gate: Tensor,  # (B, N)
) -> Tensor:
    """Residual + gate * product: (B, L, N)."""
    assert isinstance(x, HopperActivation)
    batch, length, n = residual.shape
    if (batch * length, n) != (x.rows, w.out_features) or gate.shape != (batch, n):
        found = f"residual {tuple(residual.shape)}, gate {tuple(gate.shape)}"
        raise FormatError(f"product_gate_residual: {x.rows} rows of {w.out_features}, but {found}")
    if w.columns != n:
        return fused.product_gate_residual(Primitives, x, w, residual, gate)
    residual = aligned(residual)
    out = torch.empty_like(residual)
    if gate.stride(1) != 1 or gate.stride(0) % 8 or gate.data_ptr() % 16 or gate.dtype != x.dtype:
        gate = gate.to(x.dtype).contiguous()
    _run(
        x,
        w,
        GATE_RESIDUAL,
        out=out.data_ptr(),
        residual=residual.data_ptr(),
        gate=gate.data_ptr(),
        gate_stride=gate.stride(0),
        length=max(length, 1),
    )
    return out


_ROTARY: Any = WeakTensorKeyDictionary()


def _rotary_table(rotary: Rotary) -> Tensor:
    """(L, D/2, 2) fp16 pairs of cos and sin; the last ones are kept as long as their cos lives."""
    table: Tensor | None = _ROTARY.get(rotary[0])
    if table is None:
        table = torch.stack([t[:, 0::2] for t in rotary], dim=2).to(torch.float16).contiguous()
        _ROTARY[rotary[0]] = table
    return table


def product_norm_rope(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v: (B, H, L, D), in memory as (B, L, H, D)."""
    assert isinstance(x, HopperActivation)
    length, size = rotary[0].shape
    shape = (3, x.rows // max(length, 1), length, w.out_features // (3 * size), size)
    heads = torch.empty(shape, dtype=x.dtype, device=x.codes.device).transpose(2, 3)
    product_norm_rope_into(x, w, norm_q, norm_k, rotary, heads, 0)
    q, k, v = heads.unbind(0)
    return q, k, v


def product_norm_rope_into(
    x: QuantizedActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
    heads: Tensor,  # (3, B, H, L_total, D), D contiguous
    offset: int,
) -> None:
    """Write q, k and v to heads[:, :, :, offset : offset + L]. Heads of other sizes than 128 are composed."""
    assert isinstance(x, HopperActivation)
    length, size = rotary[0].shape
    places = heads[:, :, :, offset : offset + length]
    if places.shape != (3, x.rows // max(length, 1), w.out_features // (3 * size), length, size):
        found = f"{x.rows} rows of {w.out_features} for {length} tokens"
        raise FormatError(f"product_norm_rope: {found} do not fit {tuple(heads.shape)} from {offset} on")
    if size != HEAD_DIM or w.columns != w.out_features or heads.stride(4) != 1:
        for place, values in zip(
            places, fused.product_norm_rope(Primitives, x, w, norm_q, norm_k, rotary), strict=True
        ):
            place.copy_(values)
        return
    q, k, v = places.unbind(0)
    norms = [norm.detach().to(x.dtype).contiguous() for norm in (norm_q, norm_k)]
    table = _rotary_table(rotary)
    _run(
        x,
        w,
        NORM_ROPE,
        out=q.data_ptr(),
        out_k=k.data_ptr(),
        out_v=v.data_ptr(),
        norm_q=norms[0].data_ptr(),
        norm_k=norms[1].data_ptr(),
        rotary=table.data_ptr(),
        batch_stride=q.stride(0),
        token_stride=q.stride(2),
        head_stride=q.stride(1),
        heads=q.shape[1],
        length=length,
    )
