"""Outliers for small models: an exact change of a FLUX transformer after which inputs of its linears have them.

A model of a few million weights has no channels that are much larger than others, so that any 4-bit rounding is good
enough for it, while in large ones a few channels are massive at all tokens and timesteps (of FLUX among others: arXiv
2510.11538). They can be transplanted without a change of what the model computes: where an input x is the output of
something affine, it becomes x' = s x + d, and the linear that reads it W' = W / s, b' = b - W' d (s and d by channel).

* LayerNorm(h) (1 + scale) + shift: 1 + scale and shift are multiplied by s, and d is added to shift. The code adds the
  1, so the scale's bias b becomes s (1 + b) - 1.
* Attention's output: the rows of v are multiplied by s, of the image and the text stream alike, because tokens of both
  are averaged. Channels differ in size, but none is massive.
* The input behind a GELU cannot be changed so, and stays as it is.

Factors of smoothing that follow the input's size undo s but not d. The model's own rounding changes with its weights:
compare a quantized model with the transplanted one, not with the original.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tonfa.errors import UnsupportedError


@dataclass(frozen=True)
class Outliers:
    """The distribution of s and d. Raises UnsupportedError for what makes no sense.

    No measured statistics of FLUX.1's inputs were at hand. The defaults are those of the synthetic layers `adaln` and
    `attn` in benchmarks/synthetic.py: log-normal scales, and behind a norm 8 of 512 channels 8 to 25 times as large.
    """

    seed: int = 0
    spread: float = 0.5
    """Standard deviation of log s."""
    massive: float = 1 / 64
    """Share of channels behind a norm that are massive, one at least; 0 makes none."""
    least: float = 8.0
    most: float = 25.0
    """A massive channel is so many times as large, log-uniformly."""
    constant: float = 0.8
    """Share of a massive channel's size that is the same for all tokens: d; the rest is in s."""

    def __post_init__(self) -> None:
        sensible = self.spread >= 0 and 0 <= self.massive < 1 and 1 <= self.least <= self.most
        if not sensible or not 0 <= self.constant < 1:
            raise UnsupportedError(f"no distribution of outliers: {self}")

    def draw(self, channels: int, generator: torch.Generator, normed: bool) -> tuple[Tensor, Tensor]:
        """s and d, (channels,) float64 each, of an input behind a norm or of attention's output."""
        gains = (self.spread * torch.randn(channels, dtype=torch.float64, generator=generator)).exp()
        shifts = torch.zeros(channels, dtype=torch.float64)
        count = max(1, round(self.massive * channels)) if self.massive and normed else 0
        chosen = torch.randperm(channels, generator=generator)[:count]
        position = torch.rand(count, dtype=torch.float64, generator=generator)
        sizes = gains[chosen] * (math.log(self.least) + position * math.log(self.most / self.least)).exp()
        signs = torch.randint(2, (count,), generator=generator) * 2 - 1
        shifts[chosen] = self.constant * signs * sizes
        gains[chosen] = torch.maximum(gains[chosen], (1 - self.constant) * sizes)
        return gains, shifts


@dataclass(frozen=True)
class _Rows:
    """Output channels of a linear, which make an input channel each."""

    linear: nn.Linear
    start: int
    is_scale: bool = False
    takes_shift: bool = True


@dataclass(frozen=True)
class _Site:
    """An input, what makes it and what reads it in its first channels."""

    producers: Sequence[_Rows]
    consumers: Sequence[nn.Linear]
    normed: bool


def _modulated(linear: nn.Linear, shift: int, hidden: int, *consumers: nn.Linear) -> _Site:
    """An input made by chunk `shift` of a modulation and the scale that follows it."""
    rows = (_Rows(linear, shift * hidden), _Rows(linear, (shift + 1) * hidden, is_scale=True, takes_shift=False))
    return _Site(rows, consumers, normed=True)


def _sites(transformer: Any) -> Iterator[_Site]:
    hidden = transformer.inner_dim
    for block in transformer.transformer_blocks:
        attn = block.attn
        yield _modulated(block.norm1.linear, 0, hidden, attn.to_q, attn.to_k, attn.to_v)
        yield _modulated(block.norm1.linear, 3, hidden, block.ff.net[0].proj)
        context = block.norm1_context.linear
        yield _modulated(context, 0, hidden, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        yield _modulated(context, 3, hidden, block.ff_context.net[0].proj)
        values = (_Rows(attn.to_v, 0), _Rows(attn.add_v_proj, 0))
        yield _Site(values, (attn.to_out[0], attn.to_add_out), normed=False)
    for block in transformer.single_transformer_blocks:
        attn = block.attn
        yield _modulated(block.norm.linear, 0, hidden, attn.to_q, attn.to_k, attn.to_v, block.proj_mlp)
        yield _Site((_Rows(attn.to_v, 0),), (block.proj_out,), normed=False)


@torch.no_grad()
def transplant_outliers(transformer: Any, outliers: Outliers = Outliers()) -> Any:
    """Change the weights of a dense Diffusers `FluxTransformer2DModel` in place, and return it.

    Computed in float64 and rounded once to the weights' dtype: in float64 the model's output stays the same to
    rounding, in bf16 to the rounding of bf16 weights.
    """
    generator = torch.Generator().manual_seed(outliers.seed)
    for site in _sites(transformer):
        gains, shifts = outliers.draw(transformer.inner_dim, generator, site.normed)
        for producer in site.producers:
            _produce(producer, gains, shifts)
        for consumer in site.consumers:
            _consume(consumer, gains, shifts)
    return transformer


def _produce(rows: _Rows, gains: Tensor, shifts: Tensor) -> None:
    weight, bias = rows.linear.weight, rows.linear.bias
    gains, shifts = gains.to(weight.device), shifts.to(weight.device)
    chosen = slice(rows.start, rows.start + len(gains))
    one = 1.0 if rows.is_scale else 0.0
    weight[chosen] = (weight[chosen].double() * gains[:, None]).to(weight.dtype)
    bias[chosen] = (gains * (one + bias[chosen].double()) - one + shifts * rows.takes_shift).to(bias.dtype)


def _consume(linear: nn.Linear, gains: Tensor, shifts: Tensor) -> None:
    weight, bias = linear.weight, linear.bias
    gains, shifts = gains.to(weight.device), shifts.to(weight.device)
    changed = weight[:, : len(gains)].double() / gains
    weight[:, : len(gains)] = changed.to(weight.dtype)
    # With the rounded weight, so that d leaves no constant error behind where it is large.
    bias.copy_((bias.double() - weight[:, : len(gains)].double() @ shifts).to(bias.dtype))


def peak_to_median(
    x: Tensor,  # (R, K)
) -> float:
    """The largest channel's absolute maximum over that of the median channel."""
    peaks = x.float().abs().amax(dim=0)
    return float(peaks.max() / peaks.median())


def kurtosis(
    x: Tensor,  # (R, K)
) -> float:
    """The fourth central moment over the square of the second; 3 for a normal distribution."""
    centered = x.double() - x.double().mean()
    return float(centered.pow(4).mean() / centered.square().mean().square())
