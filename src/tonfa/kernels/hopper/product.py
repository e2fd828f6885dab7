"""product: FP8 activations times 4-bit weights, with six epilogues (device/product.cu).

The weights are expanded to e4m3 by a pass before (expand.py), into a buffer that all layers share, or once for all.
Decoding them in the product's registers instead cost more than the pass: 232 us against 205 us for 9216 x 3072.

4608 x 9216 x 3072: 261 GFLOP, 190 us at the 1371 TFLOP/s of `torch._scaled_mm`; 14 MB of codes are read once, the
weights are never written in another form. The branch is one more step of 64 channels; smoothing has been done already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from tonfa.errors import FormatError
from tonfa.formats import GROUP_SIZE, INT4
from tonfa.kernels.cuda.contract import aligned
from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.hopper import tiles
from tonfa.kernels.hopper.activation import HopperActivation, empty_activation
from tonfa.kernels.hopper.add_lowrank import add_lowrank
from tonfa.kernels.hopper.ahead import AHEAD
from tonfa.kernels.hopper.device_facts import multiprocessors
from tonfa.kernels.hopper.expand import expand, wide_shape
from tonfa.kernels.hopper.inputs import PackedInput
from tonfa.kernels.hopper.layout import pack_down, pack_up
from tonfa.kernels.hopper.quantize import quantize
from tonfa.kernels.hopper.quantize_known import quantize_known, zeros
from tonfa.kernels.triton.scratch import SCRATCH
from tonfa.ops import fused
from tonfa.ops.activation import QuantizedActivation
from tonfa.ops.fused import Rotary
from tonfa.weights import SVDQWeights

PLAIN, GELU, GATE_RESIDUAL, NORM_ROPE, GELU_QUANTIZE, NORM_ROPE_FP8 = range(6)
HEAD_DIM = 128
_LARGEST = 448.0
_ROUNDING = 1.07
"""What rounding to e4m3 and to 16 bits can add to a norm."""
_CHUNK = 1024  # rows whose residual is computed at a time
_FUSED_RANK = 64
"""Up to this rank the down-projection behind a GELU fits in the product."""


class Product(Struct):
    """The kernel's parameter."""

    _fields_ = [  # noqa: RUF012
        *(
            (name, c_void_p)
            for name in (
                "x",
                "x_scale",
                "lora",
                "w",
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
                "factors",
                "next_inverse",
                "absmax",
                "norms",
                "bound",
                "next_down",
                "next_codes",
                "next_scale",
                "partial",
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
                "run",
            )
        ),
    ]


@dataclass(frozen=True)
class Following:
    """Of the linear that reads this one's GELU."""

    bound: Tensor  # (2,): |gelu(y) / smooth| is at most the norm of the smoothed input * [0] + [1]
    down: Tensor  # layout.pack_down


@dataclass(frozen=True)
class PackedProduct:
    """A layer's canonical tensors, uncopied if N is a multiple of 64, and what was computed from them at binding."""

    qweight: Tensor  # (columns, K/2) uint8
    wscales: Tensor  # (K/G, columns)
    row_scales: Tensor  # (columns,) float32
    inverse_scales: Tensor  # (N,) float32
    up: Tensor  # fragments of proj_up / row_scales
    bias: Tensor  # (N,) float32
    gain: Tensor  # (N,) float32: a bound of |y - bias| over the norm of the smoothed input
    rank: int
    out_features: int
    wide: Tensor | None = None
    """The weights in e4m3, where they are to stay so: `expand.wide_shape`."""
    behind: MutableMapping[PackedInput, Following] = field(default_factory=WeakKeyDictionary)

    def following(self, w: PackedInput) -> Following:
        """What quantizing the next linear's input in this product takes; computed once."""
        found = self.behind.get(w)
        if found is None:
            bound = torch.stack([(values * w.inverse).amax() for values in (self.gain, self.bias.abs())])
            found = self.behind[w] = Following(bound, pack_down(w.down))
        return found

    @cached_property
    def value_bound(self) -> Tensor:
        """(2,), where q, k and v are stacked: |v| is at most the norm of the smoothed input * [0] + [1]."""
        v = slice(2 * self.out_features // 3, self.out_features)
        return torch.stack([self.gain[v].amax(), self.bias[v].abs().amax()])

    @property
    def columns(self) -> int:
        """N rounded up to a multiple of 64: what the tensors hold."""
        return self.qweight.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.qweight.shape[1] * 2


def row_scales(w: SVDQWeights) -> Tensor:
    """(N,) float32: the largest |code * scale| of each output channel over 448; 1 where all are zero."""
    largest = torch.empty(w.out_features, device=w.qweight.device)
    for start in range(0, w.out_features, _CHUNK):
        codes = INT4.unpack(w.qweight[start : start + _CHUNK]).unflatten(1, (-1, GROUP_SIZE)).abs().amax(2)
        scales = w.wscales[:, start : start + _CHUNK].T.float().abs()
        largest[start : start + _CHUNK] = (codes * scales).amax(1)
    scales = largest * (1 / _LARGEST)
    return torch.where(scales > 0, scales, 1.0)


def _gain(w: SVDQWeights) -> Tensor:
    """(N,) float32: at least |weights| + |branch| of each row, by which the smoothed input's norm is multiplied."""
    down = w.proj_down.detach().float() * w.smooth_factor.detach().float().unsqueeze(1)
    up = w.proj_up.detach().float()
    branch = ((up @ (down.T @ down)) * up).sum(1).clamp_min(0).sqrt()
    squares = torch.empty(w.out_features, device=w.qweight.device)
    for start in range(0, w.out_features, _CHUNK):
        codes = INT4.unpack(w.qweight[start : start + _CHUNK]).unflatten(1, (-1, GROUP_SIZE)).float().square().sum(2)
        scales = w.wscales[:, start : start + _CHUNK].T.float().square()
        squares[start : start + _CHUNK] = (codes * scales).sum(1)
    return (squares.sqrt() + branch) * _ROUNDING


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
    SCRATCH.reserve(qweight.device, math.prod(wide_shape(qweight.shape[0], w.in_features)))
    return PackedProduct(qweight, wscales, scales, inverse, up, bias, _gain(w), w.rank, n)


def pack_product_expanded(w: SVDQWeights) -> PackedProduct:
    """The same, with the weights expanded to e4m3 once for all beside their 4-bit codes."""
    packed = pack_product(w)
    wide = torch.empty(wide_shape(packed.columns, packed.in_features), dtype=torch.uint8, device=w.qweight.device)
    expand(packed.qweight, packed.wscales, packed.inverse_scales, wide)
    return replace(packed, wide=wide)


@lru_cache(maxsize=128)
def kernel(dtype: torch.dtype, epilogue: int, tokens: int, down_rank: int | None = None) -> Kernel:
    """The kernel with this epilogue, for tiles of so many rows; GELU_QUANTIZE: the rank of the next linear."""
    from tonfa.kernels.hopper.wgmma import wrappers

    values = {
        "TOKENS": tokens,
        "STAGES": tiles.stages(tokens, down_rank),
        "THREADS": tiles.threads(tokens),
        "EPILOGUE": epilogue,
        "FP16": int(dtype == torch.float16),
    }
    if down_rank is not None:
        values["DOWN_RANK"] = down_rank
    defines = tuple((name, str(value)) for name, value in values.items())
    threads, shared = values["THREADS"], tiles.shared_bytes(tokens, down_rank)
    preamble = wrappers(tokens, down_rank or 0, dtype == torch.float16)
    return Kernel("product", defines, (Product,), threads, shared, "tonfa.kernels.hopper", "a", preamble, early=True)


def _with_weights(w: PackedProduct, device: torch.device, multiply: Callable[[Tensor], None]) -> None:
    """multiply(weights in e4m3): as they are kept, or in a buffer that a later product overwrites."""
    if w.wide is not None:
        multiply(w.wide)
        return
    steps, columns, width = shape = wide_shape(w.columns, w.in_features)

    def widen(out: Tensor) -> None:
        expand(w.qweight, w.wscales, w.inverse_scales, out.view(shape))

    if torch.cuda.is_current_stream_capturing():
        AHEAD.run(device, steps * columns * width, widen, multiply)
        return
    out = SCRATCH.empty(device, steps * columns, width, torch.uint8)
    widen(out)
    multiply(out)


def start(
    x: QuantizedActivation,
    w: PackedProduct,
    epilogue: int,
    tile: tuple[int, int] | None = None,
    down_rank: int | None = None,
    **values: Any,
) -> None:
    """Expand the weights and start the product; `values` are what the epilogue needs of `Product`.

    `tile`: its tokens, and how many of the same tokens a block takes one after another.
    """
    if not isinstance(x, HopperActivation):
        raise FormatError("product: the input must come from this backend's quantize")
    if (x.channels, x.rank) != (w.in_features, w.rank):
        found, expected = f"{x.channels} channels of rank {x.rank}", f"{w.in_features} of rank {w.rank}"
        raise FormatError(f"product: the input has {found}, the weights have {expected}")
    if x.rows == 0:
        return
    device, n = x.codes.device, w.columns
    count = multiprocessors(device)
    much = epilogue in (NORM_ROPE, NORM_ROPE_FP8, GELU)
    tokens, run = tile or (tiles.choose(x.rows, n, x.channels, count, much), 1)
    parameters = Product(
        x=x.codes.data_ptr(),
        x_scale=x.scales.data_ptr(),
        lora=x.lowrank.data_ptr(),
        w_scale=w.row_scales.data_ptr(),
        up=w.up.data_ptr(),
        bias=w.bias.data_ptr(),
        m=x.rows,
        m_pad=x.codes.shape[1],
        n=n,
        k=x.channels,
        rank=x.rank,
        rank_start=x.rank_start,
        run=run,
        **values,
    )
    units = -(-x.rows // tokens) * -(-n // (tiles.CHANNELS * run))

    def multiply(expanded: Tensor) -> None:
        parameters.w = expanded.data_ptr()
        launch(kernel(x.dtype, epilogue, tokens, down_rank), device, (min(count, units),), parameters)

    _with_weights(w, device, multiply)


def product(
    x: QuantizedActivation,  # M rows
    w: PackedProduct,
) -> Tensor:
    """(M, N) of x's dtype."""
    assert isinstance(x, HopperActivation)
    out = torch.empty((x.rows, w.columns), dtype=x.dtype, device=x.codes.device)
    start(x, w, PLAIN, out=out.data_ptr())
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
    """The input of the next linear, with a scale of each row that is known from a bound before the row is.

    Where the bound's ingredients are missing or the rank is too large, the product gathers the rows' largest
    magnitudes and a second kernel quantizes.
    """
    assert isinstance(x, HopperActivation)
    if following.channels != w.out_features:
        raise FormatError(f"product_gelu_quantize: {w.out_features} channels go to a linear of {following.channels}")
    if w.columns != w.out_features:
        return fused.product_gelu_quantize(Primitives, x, w, following)
    if x.norms is not None and following.rank <= _FUSED_RANK and w.out_features % tiles.CHANNELS == 0 and x.rows:
        return _product_gelu_quantize(x, x.norms, w, following)
    out = torch.empty((x.rows, w.out_features), dtype=x.dtype, device=x.codes.device)
    absmax, arrived = zeros(x.rows, x.codes.device)
    start(x, w, GELU, out=out.data_ptr(), next_inverse=following.inverse.data_ptr(), absmax=absmax.data_ptr())
    return quantize_known(out, following, absmax, arrived)


def _product_gelu_quantize(
    x: HopperActivation, norms: Tensor, w: PackedProduct, following: PackedInput
) -> HopperActivation:
    device = x.codes.device
    result = empty_activation(x.rows, following.channels, following.rank, x.dtype, device)
    assert result.scales is not None and result.lowrank is not None
    behind = w.following(following)
    tokens, run = tiles.choose_run(x.rows, w.columns, x.channels, multiprocessors(device), following.rank)
    slots, padded = -(-(w.columns // tiles.CHANNELS) // run), x.codes.shape[1]
    partial = torch.empty((slots, padded, following.rank), device=device)
    start(
        x,
        w,
        GELU_QUANTIZE,
        (tokens, run),
        following.rank,
        next_inverse=following.inverse.data_ptr(),
        norms=norms.data_ptr(),
        bound=behind.bound.data_ptr(),
        next_down=behind.down.data_ptr(),
        next_codes=result.codes.data_ptr(),
        next_scale=result.scales.data_ptr(),
        partial=partial.data_ptr(),
    )
    add_lowrank(partial, result)
    return result


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
    start(
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
    rows, columns = x.rows, w.out_features
    return fused.product_norm_rope_by(product_norm_rope_into, x, rows, w, columns, norm_q, norm_k, rotary)


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
    start_heads(x, w, norm_q, norm_k, rotary, places, None)


def start_heads(
    x: HopperActivation,  # B * L rows
    w: PackedProduct,
    norm_q: Tensor,  # (D,)
    norm_k: Tensor,  # (D,)
    rotary: Rotary,  # (L, D) each
    places: Tensor,  # (3, B, H, L, D), D contiguous
    factors: Tensor | None,  # (3,) float32: what q, k and v are multiplied with before they are rounded to e4m3
) -> None:
    """Normalize, rotate and write heads of 128 channels: in x's dtype, or in e4m3 if there are factors."""
    q, k, v = places.unbind(0)
    norms = [norm.detach().to(x.dtype).contiguous() for norm in (norm_q, norm_k)]
    table = _rotary_table(rotary)
    start(
        x,
        w,
        NORM_ROPE if factors is None else NORM_ROPE_FP8,
        factors=None if factors is None else factors.data_ptr(),
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
        length=q.shape[2],
    )
