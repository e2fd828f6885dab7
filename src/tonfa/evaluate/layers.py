"""Which layers a quantized transformer gets wrong: errors of weights, and of outputs for inputs of the trajectory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import Modulation, W4A16Linear
from tonfa.layers.stacked import StackedLinear
from tonfa.plan import LinearPlan, ModelPlan
from tonfa.quantizer.planned import Reader, gather

ROWS = 256
"""Inputs kept of each linear: 1 GB for all linears of FLUX.1."""


@dataclass(frozen=True)
class LayerError:
    """Relative errors of one linear, Frobenius norms over those of the reference."""

    name: str
    weight: float | None
    """||W' - W|| / ||W||; None where W is zero and W' is not."""
    output: float | None
    """||y' - y|| / ||x W^T|| over inputs of the reference's trajectory; None too where none were collected."""


@dataclass
class LayerInputs:
    """Some inputs of every linear of a dense Diffusers transformer, drawn evenly from the calls while `kept`."""

    plan: ModelPlan
    calls: int
    """How many calls of the transformer will be seen; each gives ROWS / calls inputs of a linear, one at least."""
    seed: int = 0
    rows: dict[str, list[Tensor]] = field(default_factory=dict)

    @contextmanager
    def kept(self, transformer: nn.Module) -> Iterator[None]:
        """Collect while the context is open."""
        handles = []
        for linear in self.plan.linears():
            hook = partial(self._keep, linear)
            handles.append(transformer.get_submodule(linear.sources[0]).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, linear: LinearPlan, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        known = self.rows.setdefault(linear.name, [])
        if len(known) == self.calls:
            return
        x = arguments[0].detach().flatten(0, -2)
        if linear.columns is not None:
            x = x[:, slice(*linear.columns)]
        count = min(len(x), max(1, ROWS // self.calls))
        generator = torch.Generator().manual_seed(zlib.crc32(f"{linear.name} {self.seed} {len(known)}".encode()))
        chosen = torch.randperm(len(x), generator=generator)[:count]
        known.append(x[chosen.to(x.device)].to("cpu"))

    def of(self, linear: LinearPlan) -> Tensor | None:
        """(R, K) inputs of this linear."""
        rows = self.rows.get(linear.name)
        return torch.cat(rows) if rows else None


@torch.no_grad()
def layer_errors(
    plan: ModelPlan,
    reference: Reader,
    candidate: nn.Module,
    inputs: LayerInputs | None,
    on_layer: Callable[[], None] = lambda: None,
) -> list[LayerError]:
    """Errors of all planned linears, in network order.

    `reference` holds the dense weights under Diffusers' names. The candidate is a `SVDQFluxTransformer2DModel` with
    4-bit weights or a dense transformer of Diffusers.
    """
    found = []
    state = {name: tensor.detach() for name, tensor in candidate.named_parameters()}
    device = next(candidate.parameters()).device
    for linear in plan.linears():
        weight, bias = (t.float() for t in gather(linear, reference, device))
        layer = _layer(candidate, linear, state)
        x = None if inputs is None else inputs.of(linear)
        output_error = None
        if x is not None:
            x = x.to(device)
            exact = x.float() @ weight.T
            difference = layer.output(x).float() - (exact + bias)
            output_error = _relative(difference, exact)
        found.append(LayerError(linear.name, _relative(layer.weight - weight, weight), output_error))
        on_layer()
    return found


def _relative(difference: Tensor, exact: Tensor) -> float | None:
    """The ratio of the norms; 0 for 0 / 0, None where it has no value."""
    above, below = float(difference.norm()), float(exact.norm())
    if below == 0:
        return 0.0 if above == 0 else None
    return above / below


@dataclass(frozen=True)
class _Layer:
    weight: Tensor  # (N, K) float32
    output: Callable[[Tensor], Tensor]
    """(R, K) -> (R, N), in the reference's terms: a modulation's scales without the one."""


def _layer(candidate: nn.Module, linear: LinearPlan, state: Reader) -> _Layer:
    try:
        module = candidate.get_submodule(linear.name)
    except AttributeError:
        module = None
    if isinstance(module, SVDQLinear | StackedLinear):
        return _Layer(module.weights().dense()[0], module)
    if isinstance(module, W4A16Linear):
        plus_one = torch.zeros(linear.out_features, device=module.bias.device)
        owner = candidate.get_submodule(linear.name.rpartition(".")[0])
        if isinstance(owner, Modulation) and owner.plus_one:
            for start, stop in linear.plus_one:
                plus_one[start:stop] = 1
        return _Layer(module.weights().dense()[0], lambda x: module(x).float() - plus_one)
    weight, bias = (t.float() for t in gather(linear, state))
    return _Layer(weight, lambda x: x.float() @ weight.T + bias)
