"""What the ops pass to each other, and the activation policies that a user may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tonfa.formats import FP8, INT4, INT8, UINT4, Format
from tonfa.ops.choice import parse

Activations = Literal["int4", "int8", "fp8", "none"]
"""How the input of a product is quantized. "int4": groups of 64, the published arithmetic. "int8" and "fp8": per row,
the 4-bit weights are widened to the same format. "none": not at all, the weights' own error alone remains."""

ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)


def parse_activations(name: str) -> Activations:
    """The policy of this name; raises UnsupportedError if there is none."""
    return parse("activations", name, ACTIVATIONS)


def activation_format(activations: Activations, unsigned: bool) -> Format | None:
    """The number format of a layer's input; None leaves it as it is."""
    formats: dict[Activations, Format | None] = {
        "int4": UINT4 if unsigned else INT4,
        "int8": INT8,
        "fp8": FP8,
        "none": None,
    }
    return formats[activations]


@dataclass(frozen=True)
class QuantizedActivation:
    """A linear's input in the form that its product reads; rows are the flattened leading dimensions."""

    codes: Tensor  # (M, K) codes, or (M, K/2) as the format packs them; (M, K) float where not quantized
    scales: Tensor | None  # (M, K/G) or (M, 1); None where activations are not quantized
    lowrank: Tensor | None  # (M, R) float32: x proj_down; None for a dense linear
    dtype: torch.dtype  # 16-bit dtype of the input, which the product returns

    def split(self, ranks: tuple[int, ...]) -> tuple[QuantizedActivation, ...]:
        """One view for each of several linears that share this input, with its own columns of `lowrank`."""
        if self.lowrank is None:
            return (self,) * len(ranks)
        parts = self.lowrank.split(ranks, dim=1)
        return tuple(QuantizedActivation(self.codes, self.scales, part, self.dtype) for part in parts)


@dataclass(frozen=True)
class InputWeights:
    """What quantizing an input needs: shared by all linears that read it, `proj_down` side by side."""

    smooth_factor: Tensor  # (K,)
    proj_down: Tensor  # (K, R)
    unsigned: bool
    activations: Activations


@dataclass(frozen=True)
class ScaledFP8:
    """A tensor in e4m3 with one factor for all of it, as FP8 attention returns it: codes * scale + center."""

    codes: Tensor  # (..., K) e4m3
    scale: Tensor  # (1,) float32
    center: Tensor  # (K,) of dtype
    dtype: torch.dtype  # the 16-bit dtype that it stands for

    def __getitem__(self, index: Any) -> ScaledFP8:
        """Some of the rows."""
        return ScaledFP8(self.codes[index], self.scale, self.center, self.dtype)

    def dequantize(self) -> Tensor:
        """The numbers, rounded once."""
        return (self.codes.float() * self.scale + self.center.float()).to(self.dtype)
