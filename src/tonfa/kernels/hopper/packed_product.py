"""What the products know of a layer's weights, packed once; and the weights in e4m3."""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.formats import GROUP_SIZE, INT4
from tonfa.kernels.cuda.contract import aligned
from tonfa.kernels.hopper.expand import expand, wide_shape
from tonfa.kernels.hopper.inputs import PackedInput
from tonfa.kernels.hopper.layout import pack_down, pack_up
from tonfa.kernels.triton.scratch import SCRATCH
from tonfa.weights import SVDQWeights

_LARGEST = 448.0
_ROUNDING = 1.07
"""What rounding to e4m3 and to 16 bits can add to a norm."""
_CHUNK = 1024  # rows whose scales are computed at a time


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
