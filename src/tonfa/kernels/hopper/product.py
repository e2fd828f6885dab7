"""product: FP8 activations times 4-bit weights, with six epilogues (device/product.cu).

The weights are expanded to e4m3 by a pass before (expand.py), into a buffer that all layers share, or once for all.
Decoding them in the product's registers instead cost more than the pass: 232 us against 205 us for 9216 x 3072.

4608 x 9216 x 3072: 261 GFLOP, 190 us at the 1371 TFLOP/s of `torch._scaled_mm`; 14 MB of codes are read once, the
weights are never written in another form. The branch is one more step of 64 channels; smoothing has been done already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.cuda.contract import aligned, expect
from tonfa.kernels.hopper import tiles
from tonfa.kernels.hopper.activation import HopperActivation, empty_activation
from tonfa.kernels.hopper.add_lowrank import add_lowrank
from tonfa.kernels.hopper.device_facts import multiprocessors
from tonfa.kernels.hopper.inputs import PackedInput
from tonfa.kernels.hopper.packed_product import PackedProduct
from tonfa.kernels.hopper.product_kernel import GATE_RESIDUAL, GELU, GELU_QUANTIZE, PLAIN, start
from tonfa.kernels.hopper.quantize import quantize
from tonfa.kernels.hopper.quantize_known import quantize_known, zeros
from tonfa.ops import fused
from tonfa.ops.activation import QuantizedActivation

_FUSED_RANK = 64
"""Up to this rank the down-projection behind a GELU fits in the product."""


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

    Where the bound's ingredients are missing, the rank is too large or the channels are few, the product gathers the
    rows' largest magnitudes and a second kernel quantizes.
    """
    assert isinstance(x, HopperActivation)
    if following.channels != w.out_features:
        raise FormatError(f"product_gelu_quantize: {w.out_features} channels go to a linear of {following.channels}")
    if w.columns != w.out_features:
        return fused.product_gelu_quantize(Primitives, x, w, following)
    steps_beside = x.channels > tiles.CHANNELS  # the down-projection of a tile runs among those of the next one
    whole_tiles = w.out_features % tiles.CHANNELS == 0
    if x.norms is not None and following.rank <= _FUSED_RANK and whole_tiles and steps_beside and x.rows:
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
    behind = w.following(following)
    count = multiprocessors(device)
    together = tiles.cluster(w.columns, count)
    tokens, run = tiles.choose_run(x.rows, w.columns, x.channels, count, following.rank, together)
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
    (batch, length, n), device = residual.shape, x.codes.device
    if (batch * length, n) != (x.rows, w.out_features) or gate.shape != (batch, n):
        found = f"residual {tuple(residual.shape)}, gate {tuple(gate.shape)}"
        raise FormatError(f"product_gate_residual: {x.rows} rows of {w.out_features}, but {found}")
    expect("product_gate_residual: the residual", residual, (batch, length, n), x.dtype, device)
    if w.columns != n:
        return fused.product_gate_residual(Primitives, x, w, residual, gate)
    residual = aligned(residual)
    out = torch.empty_like(residual)
    if gate.stride(1) != 1 or gate.stride(0) % 8 or gate.data_ptr() % 16 or gate.dtype != x.dtype:
        gate = aligned(gate.to(x.dtype))
    expect("product_gate_residual: the gate", gate, (batch, n), x.dtype, device)
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
