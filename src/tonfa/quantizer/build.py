"""One block of a checkpoint made from a dense model on disk, with or without a calibration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tonfa.checkpoint.strict import Spec
from tonfa.plan import BlockPlan, LinearPlan
from tonfa.quantizer.calibration import Collector, Observe, Walk, input_owner
from tonfa.quantizer.checks import check_finite, check_linear
from tonfa.quantizer.memory import enough_memory
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.planned import gather, planned_spec, quantize_planned, relative_error
from tonfa.quantizer.recipe import Recipe, find_smoothing
from tonfa.quantizer.threads import suited_threads

Finished = Callable[[str, float], None]
"""Told each linear's name and the relative error of its weight."""

_Dense = dict[str, tuple[Tensor, Tensor]]
"""Weight (N, K) and bias (N,) by planned linear."""


class Source(Protocol):
    """A dense model on disk: `checkpoint.tensors.TensorFolder`."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        ...

    def spec(self) -> Spec:
        """Shapes and dtypes by name."""
        ...

    def identity(self) -> list[tuple[str, int, int]]:
        """Equal only for unchanged files."""
        ...

    def __getitem__(self, name: str, /) -> Tensor:
        """One tensor, read now."""
        ...


def block_spec(block: BlockPlan, source: Spec, rank: int, dtype: torch.dtype) -> Spec:
    """Names, shapes and dtypes of the tensors that a block becomes."""
    spec = {target: (source[name][0], dtype) for target, name in block.copies}
    for linear in block.linears:
        spec |= planned_spec(linear, rank, dtype)
    return spec


class BlockBuilder:
    """Makes blocks in the plan's order. Without a walk one linear is in memory at a time, with one a whole block."""

    def __init__(
        self,
        source: Source,
        recipe: Recipe,
        dtype: torch.dtype,
        device: torch.device | str,
        walk: Walk | None = None,
        sequential: bool = False,
    ) -> None:
        self._source, self._recipe, self._dtype, self._device = source, recipe, dtype, device
        self._walk, self._sequential = walk, sequential

    def make(self, block: BlockPlan, finished: Finished) -> dict[str, Tensor]:
        """The tensors of the next block, on the host."""
        tensors = self._copies(block)
        if self._walk is None:
            for linear in block.linears:
                weight, bias = gather(linear, self._source, self._device)
                tensors |= self._quantized(linear, weight, bias, None, None, finished)
            return tensors
        dense = self._dense(block)
        collector = Collector(block, self._dtype, self._recipe.seed)
        self._run_dense(self._walk, block, {**tensors}, dense, collector, keep=not self._sequential)
        collector.check()
        tensors |= self._calibrated(block, dense, collector.moments, finished)
        if self._sequential:
            self._walk.run(block, tensors, quantized=True, observe=None, keep=True)
        return tensors

    def pass_by(self, block: BlockPlan, made: Mapping[str, Tensor]) -> None:
        """Let the walk go on over a block that an earlier run has made."""
        if self._walk is None:
            return
        if self._sequential:
            names = block_spec(block, self._source.spec(), self._recipe.rank, self._dtype)
            self._walk.run(block, {name: made[name] for name in names}, quantized=True, observe=None, keep=True)
        else:
            self._run_dense(self._walk, block, self._copies(block), self._dense(block), None, keep=True)

    def _copies(self, block: BlockPlan) -> dict[str, Tensor]:
        copies = {}
        for name, original in block.copies:
            tensor = self._source[original]
            check_finite(name, tensor, self._dtype)
            copies[name] = tensor.to(self._dtype)
        return copies

    def _dense(self, block: BlockPlan) -> _Dense:
        """The block's linears, on the device; NaN or Inf is named here, before it spreads to other layers."""
        dense = {}
        for linear in block.linears:
            weight, bias = gather(linear, self._source, self._device)
            check_linear(linear.name, weight, bias, self._dtype)
            dense[linear.name] = weight, bias
        return dense

    def _run_dense(
        self,
        walk: Walk,
        block: BlockPlan,
        tensors: dict[str, Tensor],
        dense: _Dense,
        observe: Observe | None,
        *,
        keep: bool,
    ) -> None:
        """Run the 16-bit block; `tensors` are its copies."""
        for name, (weight, bias) in dense.items():
            tensors |= {f"{name}.weight": weight.to(self._dtype), f"{name}.bias": bias.to(self._dtype)}
        walk.run(block, tensors, quantized=False, observe=observe, keep=keep)

    def _calibrated(
        self, block: BlockPlan, dense: _Dense, moments: dict[str, InputMoments], finished: Finished
    ) -> dict[str, Tensor]:
        """The 4-bit linears of a block. Weights and moments are given up when the last that needs them is made."""
        tensors: dict[str, Tensor] = {}
        factors: dict[str, Tensor] = {}
        waiting = Counter(input_owner(linear) for linear in block.linears)
        for linear in block.linears:
            owner = input_owner(linear)
            known = moments.get(owner)
            on_gpu = "choose --device cpu, or a GPU with more memory"
            with enough_memory(f"solving for {linear.name}", "free some for it on the host", on_gpu):
                if known is not None and waiting[owner] > 1 and owner not in factors:
                    sharing = [dense[other.name][0] for other in block.linears if input_owner(other) == owner]
                    with suited_threads(max(weight.numel() for weight in sharing)):
                        factors[owner] = find_smoothing(sharing, known, self._recipe, dtype=self._dtype)
                weight, bias = dense.pop(linear.name)
                tensors |= self._quantized(linear, weight, bias, known, factors.get(owner), finished)
            waiting[owner] -= 1
            if not waiting[owner]:
                moments.pop(owner, None)
        return tensors

    def _quantized(
        self,
        linear: LinearPlan,
        weight: Tensor,
        bias: Tensor,
        moments: InputMoments | None,
        smooth_factor: Tensor | None,
        finished: Finished,
    ) -> dict[str, Tensor]:
        weights = quantize_planned(linear, weight, bias, self._recipe, self._dtype, moments, smooth_factor)
        finished(linear.name, relative_error(weight, weights))
        return {f"{linear.name}.{field}": tensor.cpu() for field, tensor in weights.tensors().items()}
