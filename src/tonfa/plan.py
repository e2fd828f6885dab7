"""What is quantized how: a plan names every linear of a quantized model, its dense sources and its form.

A plan is data. The quantizer walks it, the converters rename along it, and each model family has one: FLUX's is in
`models/flux/plan.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LinearPlan:
    """One linear of the quantized model and the dense weights that it is made of."""

    name: str
    """In the quantized model, such as `transformer_blocks.0.attn.to_qkv`."""
    sources: tuple[str, ...]
    """Dense linears whose rows are stacked, such as `transformer_blocks.0.attn.to_q`, `.to_k`, `.to_v`."""
    out_features: int
    in_features: int
    kind: Literal["svdq", "w4a16"] = "svdq"
    columns: tuple[int, int] | None = None
    """Input channels taken from the source; None takes all. Splits FLUX's single-block `proj_out`."""
    source_bias: bool = True
    """Whether the source's bias belongs to this linear; otherwise its bias is zero."""
    unsigned: bool = False
    """Its input comes from a GELU: 4-bit activations are shifted and unsigned."""
    plus_one: tuple[tuple[int, int], ...] = ()
    """Row ranges whose bias has 1 added: a modulation's scales, so that the model computes norm(x) * scale + shift."""
    shares_input: str | None = None
    """Name of the linear whose input this one reads too; both then have one smoothing factor."""
    rank: int | None = None
    """Width of its low-rank branch; None is the checkpoint's."""
    parts: int = 1
    """More than 1: its rows are so many linears with a smoothing factor and a branch of their own."""


@dataclass(frozen=True)
class BlockPlan:
    """The unit of streaming: one block's linears and the tensors that are copied as they are (target, source)."""

    name: str
    linears: tuple[LinearPlan, ...]
    copies: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ModelPlan:
    """All blocks of a model, in network order; the first holds what stands outside of the repeated blocks."""

    blocks: tuple[BlockPlan, ...]

    def linears(self) -> Iterator[LinearPlan]:
        """Every linear of every block."""
        for block in self.blocks:
            yield from block.linears
