"""Calibrating a model block by block: what a block's inputs are, and what is collected of them.

A `Walk` holds the hidden states of all samples between two blocks and runs one block at a time over them. The model
supplies it (FLUX's is `models/flux/walk.py`); plan, collection and solvers know nothing of the network.

By default every block reads what the 16-bit blocks before it made: inputs do not depend on the recipe. With
`sequential`, it reads what the quantized blocks made, with their errors in it, at the cost of a second pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tonfa.plan import BlockPlan, LinearPlan
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.smoothing import SEARCH_TOKENS

Observe = Callable[[str, Tensor], None]
"""Called with a planned linear's name and its input (M, K)."""

TOKENS_PER_CHANNEL = 4
"""Fewer tokens than this for each channel of the widest input leave most of its covariance to chance."""


class Walk(Protocol):
    """Hidden states of all samples in front of one block."""

    def run(
        self, block: BlockPlan, tensors: Mapping[str, Tensor], *, quantized: bool, observe: Observe | None, keep: bool
    ) -> None:
        """Run the next block on every sample; `keep` goes on to the block after it.

        `tensors` are the block's by the names of the quantized model: fields of its 4-bit linears if `quantized`, else
        `<linear>.weight` and `.bias`; copies in both cases.
        """
        ...


class Calibration(Protocol):
    """Where the samples come from."""

    @property
    def sequential(self) -> bool:
        """Whether blocks read what quantized blocks made."""
        ...

    def identity(self) -> Mapping[str, Any]:
        """All that decides the samples, as JSON: a run with another identity does not go on with them."""
        ...

    def nbytes(self) -> int:
        """What the samples take on the disk."""
        ...

    def open(self, folder: Path) -> Walk:
        """Draw what is missing of the samples in `folder`, then stand in front of the first block."""
        ...


def input_owner(linear: LinearPlan) -> str:
    """The linear under whose name the input of this one is collected."""
    return linear.shares_input or linear.name


class Collector:
    """The moments of a block's inputs, on the device of the first batch; linears that share an input share them."""

    def __init__(self, block: BlockPlan, dtype: torch.dtype, seed: int) -> None:
        svdq = [linear for linear in block.linears if linear.kind == "svdq"]
        self._channels = {input_owner(linear): linear.in_features for linear in svdq}
        self._owners = {linear.name: input_owner(linear) for linear in svdq}
        self._dtype, self._seed = dtype, seed
        self.moments: dict[str, InputMoments] = {}
        """By the owner's name."""

    def __call__(self, name: str, x: Tensor) -> None:
        """Add a batch of inputs (M, K) of a planned linear."""
        if self._owners[name] != name:
            return
        if name not in self.moments:
            empty = InputMoments.empty(
                name, self._channels[name], kept=SEARCH_TOKENS, seed=self._seed, device=x.device, dtype=self._dtype
            )
            self.moments[name] = empty
        self.moments[name].add(x)

    def check(self) -> None:
        """Raise FormatError, naming the linear, if an input was never seen or holds NaN or Inf."""
        for name, channels in self._channels.items():
            self.moments.get(name, InputMoments.empty(name, channels)).check(channels)
