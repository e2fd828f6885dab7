"""product_norm_rope_fp8: q, k and v leave the product in e4m3, where FP8 attention reads them.

24 heads of 4608 tokens: 42 MB are written, where 16 bits are 85, and nothing passes over them again. The norm is taken
in float32 and rounded once. Scales come from bounds (kernels/attention/fp8_scales.py) before the product starts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tonfa.errors import FormatError
from tonfa.kernels.attention.fp8_scales import Source, scales
from tonfa.kernels.hopper.activation import HopperActivation
from tonfa.kernels.hopper.packed_product import PackedProduct
from tonfa.kernels.hopper.product_norm_rope import HEAD_DIM, start_heads
from tonfa.ops.attention_fp8 import QuantizedHeads
from tonfa.ops.fused import Projection, empty_heads


def _source(p: Projection) -> Source | None:
    """What bounds these tokens; None if this kernel does not take them."""
    length, size = p.rotary[0].shape
    if not isinstance(p.x, HopperActivation) or p.x.norms is None or not isinstance(p.w, PackedProduct):
        return None
    fits = p.x.rows > 0 and p.x.rows % length == 0 and size == HEAD_DIM
    if not fits or p.w.columns != p.w.out_features or p.w.out_features % (3 * HEAD_DIM):
        return None
    return Source(p.x.norms, p.x.rows, p.w.value_bound, p.norm_q, p.norm_k)


def product_norm_rope_fp8(
    projections: Sequence[Projection],  # one or two, whose tokens lie one after the other
) -> QuantizedHeads | None:
    """The heads of all tokens; None if the inputs' norms are unknown or this kernel does not take the shapes."""
    sources = [source for p in projections if (source := _source(p)) is not None]
    if not 0 < len(sources) == len(projections) <= 2:
        return None
    lengths = [p.rotary[0].shape[0] for p in projections]
    batch, heads = sources[0].rows // lengths[0], projections[0].w.out_features // (3 * HEAD_DIM)
    for p, source, length in zip(projections, sources, lengths, strict=True):
        if (source.rows, p.w.out_features) != (batch * length, 3 * heads * HEAD_DIM):
            found = f"{source.rows} rows of {length} tokens, {p.w.out_features} channels"
            raise FormatError(f"product_norm_rope_fp8: expected {batch} images of {heads} heads each, got {found}")
    device = sources[0].norms.device
    with torch.cuda.device(device):
        known = scales(sources)
    joint = empty_heads(batch, heads, sum(lengths), HEAD_DIM, torch.float8_e4m3fn, device)
    offset = 0
    for p, length in zip(projections, lengths, strict=True):
        assert isinstance(p.x, HopperActivation)
        places = joint[:, :, :, offset : offset + length]
        start_heads(p.x, p.w, p.norm_q, p.norm_k, p.rotary, places, known.factors)
        offset += length
    q, k, v = joint.unbind(0)
    return QuantizedHeads(q, k, v, known.scalars, known.descale)
