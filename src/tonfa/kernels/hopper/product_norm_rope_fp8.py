"""product_norm_rope_fp8: q, k and v leave the product in e4m3, where FP8 attention reads them.

24 heads of 4608 tokens: 42 MB are written, where 16 bits are 85, and nothing passes over them again. The norm is taken
in float32 and rounded once. Scales and v's center are known before the product starts (attention_center.py); the center
is a part of the product's bias.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tonfa.errors import FormatError
from tonfa.kernels.hopper.activation import HopperActivation
from tonfa.kernels.hopper.attention_center import Source, prepare
from tonfa.kernels.hopper.packed_product import PackedProduct
from tonfa.kernels.hopper.product_norm_rope import HEAD_DIM, Rounding, norm_weights, start_heads
from tonfa.ops.attention_fp8 import QuantizedHeads
from tonfa.ops.fused import Projection, empty_heads


def _source(p: Projection) -> Source | None:
    """What makes heads of these tokens; None if this kernel does not take them."""
    length, size = p.rotary[0].shape
    if not isinstance(p.x, HopperActivation) or p.x.norms is None or not isinstance(p.w, PackedProduct):
        return None
    fits = p.x.rows > 0 and p.x.rows % length == 0 and size == HEAD_DIM
    if not fits or p.w.columns != p.w.out_features or p.w.out_features % (3 * HEAD_DIM):
        return None
    return Source(p.x, p.x.norms, p.w, *norm_weights(p.x, p.norm_q, p.norm_k))


def product_norm_rope_fp8(
    projections: Sequence[Projection],  # one or two, whose tokens lie one after the other
) -> QuantizedHeads | None:
    """The heads of all tokens; None if the inputs' norms are unknown or this kernel does not take the shapes."""
    sources = [source for p in projections if (source := _source(p)) is not None]
    if not 0 < len(sources) == len(projections) <= 2:
        return None
    lengths = [p.rotary[0].shape[0] for p in projections]
    batch, heads = sources[0].x.rows // lengths[0], sources[0].w.out_features // (3 * HEAD_DIM)
    for source, length in zip(sources, lengths, strict=True):
        if (source.x.rows, source.w.out_features) != (batch * length, 3 * heads * HEAD_DIM):
            found = f"{source.x.rows} rows of {length} tokens, {source.w.out_features} channels"
            raise FormatError(f"product_norm_rope_fp8: expected {batch} images of {heads} heads each, got {found}")
    device = sources[0].x.codes.device
    joint = empty_heads(batch, heads, sum(lengths), HEAD_DIM, torch.float8_e4m3fn, device)
    places = joint.split(lengths, dim=3)
    largest = max(range(len(sources)), key=lambda i: lengths[i])  # has most of the v that are centered
    known = prepare(sources, largest)
    for p, s, bias, place in zip(projections, sources, known.biases, places, strict=True):
        start_heads(s.x, s.w, s.norm_q, s.norm_k, p.rotary, place, Rounding(known.factors, bias))
    q, k, v = joint.unbind(0)
    return QuantizedHeads(q, k, v, known.center, known.scalars, known.descale)
