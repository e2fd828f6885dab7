"""product: FP8 x FP8 or INT8 x INT8 tiles on tensor cores, then scales, the low-rank branch, bias and an epilogue.

    out = epilogue(a_scale[m] w_scale[n] sum_k a[m, k] w[n, k] + lowrank[m] proj_up[n]^T + bias[n])

Programs are as many as multiprocessors and take tiles in turn, columns of `group_m` row tiles, so that a weight tile is
found in L2 by all of them. From sm_90 on, operands come through tensor descriptors (TMA) and whole tiles leave through
them. The low-rank branch is one more matrix product on the scaled float32 sums; its operands are loaded before the loop
over K, which hides their latency. Its arithmetic is that of bf16 where input and weights are bf16, else TF32, with
three products for float32 inputs.

Floor of 4608 x 9216 x 3072 on an H200: 261 GFLOP, 190 us at the 1371 TFLOP/s of `torch._scaled_mm`; 141 MB, 33 us.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tonfa.errors import FormatError, UnsupportedError
from tonfa.formats import GELU_SHIFT
from tonfa.kernels.triton import tiles
from tonfa.kernels.triton.device import gelu
from tonfa.kernels.triton.expand import expand, row_scales
from tonfa.kernels.triton.launch import launch
from tonfa.kernels.triton.scratch import SCRATCH
from tonfa.kernels.triton.w4a16 import pack_w4a16, w4a16
from tonfa.ops.activation import Activations, QuantizedActivation
from tonfa.ops.fused import RMS_NORM_EPS
from tonfa.weights import SVDQWeights, W4A16Weights

CODE_DTYPES: dict[Activations, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}

_EPS = tl.constexpr(RMS_NORM_EPS)
_SLICE = 128


@dataclass(frozen=True)
class PackedProduct:
    """The canonical tensors of a layer, uncopied, with what was computed from them when it was bound."""

    qweight: Tensor | None  # (N, K/2) uint8; None where the widened weights stay
    wscales: Tensor | None  # (K/G, N)
    widened: Tensor | None  # (N, K) int8 or e4m3; None where it is made for each product
    row_scales: Tensor  # (N,) float32
    inverse_scales: Tensor  # (N,) float32
    proj_up: Tensor  # (N, R)
    bias: Tensor  # (N,) float32
    shape: tuple[int, int]  # N, K
    code_dtype: torch.dtype


@triton.jit
def store_rows(
    y,  # (BLOCK_M, WIDTH) float32
    out,
    m0,
    n0,
    M,
    N,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write a tile of (M, N)."""
    if TMA:
        out.store([m0, n0], y.to(out.dtype))
    else:
        rows, columns = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, WIDTH)
        pointers = out + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(pointers, y.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def gate_residual(
    y,  # (BLOCK_M, WIDTH) float32
    m0,
    n0,
    M,
    N,
    residual,  # (M, N)
    gate,  # (B, N), rows `gate_stride` apart
    gate_stride,
    length,
    ONE_IMAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Residual + gate * y, finite in float16."""
    rows, columns = m0 + tl.arange(0, BLOCK_M), n0 + tl.arange(0, WIDTH)
    live = (rows < M)[:, None] & (columns < N)[None, :]
    source = tl.load(residual + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=live, other=0)
    if ONE_IMAGE:
        gates = tl.load(gate + (m0 // length) * gate_stride + columns, mask=columns < N, other=0)[None, :]
    else:
        gates = tl.load(gate + (rows // length)[:, None] * gate_stride + columns[None, :], mask=live, other=0)
    y = source.to(tl.float32) + gates.to(tl.float32) * y
    if residual.dtype.element_ty == tl.float16:
        y = tl.clamp(y, -65504.0, 65504.0)
    return y


@triton.jit
def store_heads(
    y,  # (BLOCK_M, WIDTH) float32: whole heads of stacked q, k, v
    m0,
    n0,
    M,
    N,
    out,  # q of all heads; k and v `part_stride` and twice that behind it
    norm_q,  # (D,)
    norm_k,  # (D,)
    cos,  # (L, D)
    sin,  # (L, D)
    length,
    part_stride,
    batch_stride,
    head_stride,
    token_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """RMSNorm and rotation of q and k, each head to its place."""
    HEADS: tl.constexpr = WIDTH // HEAD_DIM
    HALF: tl.constexpr = HEAD_DIM // 2
    all_heads = N // (3 * HEAD_DIM)
    rows = m0 + tl.arange(0, BLOCK_M)
    head = n0 // HEAD_DIM + tl.arange(0, HEADS)
    part = head // all_heads
    channel = tl.arange(0, HEAD_DIM)
    token = rows % length
    heads = tl.reshape(y, (BLOCK_M, HEADS, HEAD_DIM))
    if n0 < 2 * all_heads * HEAD_DIM:
        rotated = (part < 2)[:, None]
        q_weight = tl.load(norm_q + channel).to(tl.float32)[None, :]
        k_weight = tl.load(norm_k + channel).to(tl.float32)[None, :]
        weight = tl.where((part == 0)[:, None], q_weight, k_weight)
        inverse = tl.rsqrt(tl.sum(heads * heads, axis=2) * (1.0 / HEAD_DIM) + _EPS)
        normed = heads * inverse[:, :, None] * weight[None, :, :]
        real, imaginary = tl.split(tl.reshape(normed, (BLOCK_M, HEADS, HALF, 2)))
        angle = token[:, None] * HEAD_DIM + 2 * tl.arange(0, HALF)[None, :]
        live = (rows < M)[:, None]
        c = tl.load(cos + angle, mask=live, other=0).to(tl.float32)[:, None, :]
        s = tl.load(sin + angle, mask=live, other=0).to(tl.float32)[:, None, :]
        turned = tl.join(real * c - imaginary * s, imaginary * c + real * s)
        heads = tl.where(rotated[None, :, :], tl.reshape(turned, (BLOCK_M, HEADS, HEAD_DIM)), heads)
    row_offset = (rows // length).to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    head_offset = part.to(tl.int64) * part_stride + (head % all_heads).to(tl.int64) * head_stride
    pointers = out + row_offset[:, None, None] + head_offset[None, :, None] + channel[None, None, :]
    live = (rows < M)[:, None, None] & (head < 3 * all_heads)[None, :, None]
    tl.store(pointers, heads.to(out.dtype.element_ty), mask=live)


@triton.jit
def branch_operand(
    matrix,  # (ROWS, R), rows `stride` apart
    rows,
    r0,
    stride,
    ROWS,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Columns r0 to r0 + WIDTH, zero behind RANK."""
    r = r0 + tl.arange(0, WIDTH)
    inside = (rows < ROWS)[:, None] & (r < RANK)[None, :]
    return tl.load(matrix + rows.to(tl.int64)[:, None] * stride + r[None, :], mask=inside, other=0)


@triton.jit
def branch_product(low, up, y, BRANCH: tl.constexpr):
    """Y + low up^T, on tensor cores."""
    if BRANCH == "bf16":
        return tl.dot(low.to(tl.bfloat16), up.T, y)
    else:
        return tl.dot(low, up.to(tl.float32).T, y, input_precision=BRANCH)


@triton.jit(do_not_specialize=["M", "length"])
def product_kernel(
    a,  # (M, K) codes: descriptor or pointer
    b,  # (N, K) codes: descriptor or pointer
    a_scales,  # (M,) float32
    b_scales,  # (N,) float32
    lowrank,  # (M, R) float32
    up,  # (N, R)
    bias,  # (N,) float32
    out,  # (M, N): descriptor or pointer; q for "heads"
    M,
    N,
    K,
    lowrank_stride,
    length,  # rows of an image, for "gate" and "heads"
    residual,
    gate,
    gate_stride,
    norm_q,
    norm_k,
    cos,
    sin,
    part_stride,
    batch_stride,
    head_stride,
    token_stride,
    EPILOGUE: tl.constexpr,  # "plain", "gelu", "gate", "heads"
    INTEGERS: tl.constexpr,
    TMA: tl.constexpr,
    BRANCH: tl.constexpr,  # "bf16", "tf32", "tf32x3"
    RANK: tl.constexpr,
    ONE_IMAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Tiles program_id, program_id + programs, ... of the output."""
    SUM: tl.constexpr = tl.int32 if INTEGERS else tl.float32
    RANK_BLOCK: tl.constexpr = 32 if RANK > 16 else 16
    WIDTH: tl.constexpr = 128 if BLOCK_N > 128 else BLOCK_N
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    group_size = GROUP_M * column_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        group = tile // group_size
        group_rows = min(row_tiles - group * GROUP_M, GROUP_M)
        m0 = (group * GROUP_M + tile % group_size % group_rows) * BLOCK_M
        n0 = (tile % group_size // group_rows) * BLOCK_N
        rows = m0 + tl.arange(0, BLOCK_M)
        a_scale = tl.load(a_scales + rows, mask=rows < M, other=0)
        if RANK > 0:
            low = branch_operand(lowrank, rows, 0, lowrank_stride, M, RANK, RANK_BLOCK)
            left_up = branch_operand(up, n0 + tl.arange(0, WIDTH), 0, RANK, N, RANK, RANK_BLOCK)
            if BLOCK_N > WIDTH:
                right_up = branch_operand(up, n0 + WIDTH + tl.arange(0, WIDTH), 0, RANK, N, RANK, RANK_BLOCK)

        sums = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        if TMA:
            for k in range(0, K, BLOCK_K):
                sums = tl.dot(a.load([m0, k]), b.load([n0, k]).T, sums, out_dtype=SUM)
        else:
            k = tl.arange(0, BLOCK_K)
            a_tile = a + (rows % M).to(tl.int64)[:, None] * K + k[None, :]
            b_tile = b + ((n0 + tl.arange(0, BLOCK_N)) % N).to(tl.int64)[:, None] * K + k[None, :]
            for _ in range(0, K, BLOCK_K):
                sums = tl.dot(tl.load(a_tile), tl.load(b_tile).T, sums, out_dtype=SUM)
                a_tile += BLOCK_K
                b_tile += BLOCK_K

        if BLOCK_N > WIDTH:
            parts = tl.split(tl.permute(tl.reshape(sums, (BLOCK_M, 2, WIDTH)), (0, 2, 1)))
        else:
            parts = (sums,)
        for i in tl.static_range(BLOCK_N // WIDTH):
            n = n0 + i * WIDTH
            columns = n + tl.arange(0, WIDTH)
            b_scale = tl.load(b_scales + columns, mask=columns < N, other=0)
            shift = tl.load(bias + columns, mask=columns < N, other=0)
            y = parts[i].to(tl.float32) * a_scale[:, None] * b_scale[None, :] + shift[None, :]
            if RANK > 0:
                y = branch_product(low, right_up if i == 1 else left_up, y, BRANCH)
                for r in tl.static_range(RANK_BLOCK, RANK, RANK_BLOCK):
                    more_low = branch_operand(lowrank, rows, r, lowrank_stride, M, RANK, RANK_BLOCK)
                    more_up = branch_operand(up, columns, r, RANK, N, RANK, RANK_BLOCK)
                    y = branch_product(more_low, more_up, y, BRANCH)
            if EPILOGUE == "heads":
                store_heads(
                    y, m0, n, M, N, out, norm_q, norm_k, cos, sin, length,
                    part_stride, batch_stride, head_stride, token_stride, HEAD_DIM, BLOCK_M, WIDTH,
                )  # fmt: skip
            else:
                if EPILOGUE == "gelu":
                    y = gelu(y)
                if EPILOGUE == "gate":
                    y = gate_residual(y, m0, n, M, N, residual, gate, gate_stride, length, ONE_IMAGE, BLOCK_M, WIDTH)
                store_rows(y, out, m0, n, M, N, TMA, BLOCK_M, WIDTH)


def _unshifted_bias(w: SVDQWeights) -> Tensor:
    """The bias of `SVDQWeights.unshifted`, float32 (N,), without the float32 copies of the weights it makes.

    The correction is a product with GELU_SHIFT / smooth_factor; biased by 8, the codes are those that w4a16 reads.
    """
    if not w.unsigned:
        return w.bias.float()
    shift = (GELU_SHIFT / w.smooth_factor.float()).unsqueeze(0)
    biased = W4A16Weights(w.qweight ^ 0x88, w.wscales, -8 * w.wscales, w.bias)
    return w4a16(shift, pack_w4a16(biased))[0]


def pack_product(w: SVDQWeights, residency: str = "int4", *, activations: Activations) -> PackedProduct:
    """Row scales and a bias without shift. `residency` is the form in which the weights stay on the device.

    "int4": as they are, expanded into a shared buffer before each product. The name of the activations' format, "fp8"
    or "int8": expanded once, twice the memory.
    """
    w.check("SVDQWeights")
    if residency not in ("int4", activations):
        raise UnsupportedError(f"residency={residency!r} is unknown; choose 'int4' or {activations!r}")
    code_dtype = CODE_DTYPES[activations]
    qweight, wscales = w.qweight.contiguous(), w.wscales.contiguous()
    scales = row_scales(qweight, wscales, code_dtype)
    inverse = torch.where(scales > 0, scales.reciprocal(), 0.0)
    shape = (w.out_features, w.in_features)
    kept: tuple[Tensor | None, Tensor | None, Tensor | None] = (qweight, wscales, None)
    if residency == "int4":
        SCRATCH.reserve(qweight.device, shape[0] * shape[1])
    else:
        widened = torch.empty(shape, dtype=code_dtype, device=qweight.device)
        expand(qweight, wscales, inverse, widened)
        kept = (None, None, widened)
    return PackedProduct(*kept, scales, inverse, w.proj_up.contiguous(), _unshifted_bias(w), shape, code_dtype)


def widened(w: PackedProduct) -> Tensor:
    """(N, K) in the 8-bit format; valid until the next call on this stream if the weights stay in 4 bits."""
    if w.widened is not None:
        return w.widened
    assert w.qweight is not None and w.wscales is not None
    out = SCRATCH.empty(w.qweight.device, *w.shape, w.code_dtype)
    expand(w.qweight, w.wscales, w.inverse_scales, out)
    return out


def _branch(x: QuantizedActivation, w: PackedProduct) -> str:
    if x.dtype == w.proj_up.dtype == torch.bfloat16:
        return "bf16"
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


def run(
    x: QuantizedActivation,  # M rows
    w: PackedProduct,
    epilogue: str,
    out: Tensor,  # (M, N); (3, B, H, L, D) with any strides but of D for "heads"
    *,
    length: int = 1,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    norms: tuple[Tensor, Tensor] | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    tile: tiles.Tile | None = None,
) -> None:
    """Expand the weights if they stay in 4 bits, and multiply."""
    if x.lowrank is None or x.scales is None or x.codes.dtype != w.code_dtype:
        raise ValueError("product: the input must come from this backend's quantize, with the same activations")
    (m, k), n, rank = x.codes.shape, w.shape[0], w.proj_up.shape[1]
    if k != w.shape[1]:
        raise FormatError(f"product: the input has {k} channels, the weights have {w.shape[1]}")
    if x.lowrank.shape[1] != rank:
        raise FormatError(f"product: the input has {x.lowrank.shape[1]} low-rank channels, the weights have {rank}")
    if m == 0:
        return
    capability, multiprocessors = tiles.processors(x.codes.device)
    heads = epilogue == "heads"
    head_dim = rotary[0].shape[1] if rotary is not None else 1
    tile = tile or tiles.choose(capability, multiprocessors, m, n, k, head_dim)
    matrix = widened(w)
    tma = capability >= (9, 0) and n * x.dtype.itemsize % 16 == 0
    a, b, target = x.codes, matrix, out
    if tma:
        a = TensorDescriptor.from_tensor(x.codes, [tile.block_m, tile.block_k])
        b = TensorDescriptor.from_tensor(matrix, [tile.block_n, tile.block_k])
        if not heads:
            target = TensorDescriptor.from_tensor(out, [tile.block_m, min(tile.block_n, _SLICE)])
    programs = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    if capability >= (9, 0):
        programs = min(programs, multiprocessors)
    operands = (
        a,
        b,
        x.scales,
        w.row_scales,
        x.lowrank,
        w.proj_up,
        w.bias,
        target,
        m,
        n,
        k,
        x.lowrank.stride(0),
        length,
    )
    gating = (residual, gate, gate.stride(0) if gate is not None else None)
    strides = out.stride()[:4] if heads else (None,) * 4
    rotating = (*(norms or (None, None)), *(rotary or (None, None)), *strides)
    one_image = length % tile.block_m == 0 or m <= length
    constants = (epilogue, w.code_dtype == torch.int8, tma, _branch(x, w), rank, one_image, head_dim)
    cut = (tile.block_m, tile.block_n, tile.block_k, tile.group_m)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    launch(product_kernel, (programs, 1, 1), (*operands, *gating, *rotating, *constants, *cut), **options)


def product(
    x: QuantizedActivation,  # M rows
    w: PackedProduct,
) -> Tensor:
    """(M, N) of x's dtype."""
    out = torch.empty((x.codes.shape[0], w.shape[0]), dtype=x.dtype, device=x.codes.device)
    run(x, w, "plain", out)
    return out
