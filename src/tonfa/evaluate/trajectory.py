"""What a pipeline asks its transformer while it draws, and what another transformer answers to the same questions.

Teacher-forced: every call gets the inputs that the reference met, so that an early error does not change later ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tonfa.errors import FormatError

_OF_A_STEP = ("hidden_states", "timestep")
"""Arguments that change from step to step; all others are kept once for a trajectory."""


@dataclass(frozen=True)
class Call:
    """One step of a batch, on the host."""

    changing: Mapping[str, Any]
    velocity: Tensor  # (B, L, C)

    @property
    def timestep(self) -> float:
        """From 1, all noise, to 0."""
        return float(self.changing["timestep"].flatten()[0])


@dataclass
class Trajectory:
    """All steps of one batch of pictures."""

    constant: dict[str, Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def arguments(self, call: Call, device: torch.device) -> dict[str, Any]:
        """What the transformer was called with, on `device`."""
        return {name: _moved(value, device) for name, value in {**self.constant, **call.changing}.items()}


def _moved(value: Any, device: torch.device | str) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def recorded(transformer: nn.Module) -> Iterator[Trajectory]:
    """Record every call of the transformer by keyword, as FLUX's pipelines make them, while the context is open."""
    trajectory = Trajectory()

    def keep(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
        changing = {name: _moved(keywords[name], "cpu") for name in _OF_A_STEP}
        if not trajectory.calls:
            rest = {name: value for name, value in keywords.items() if name not in _OF_A_STEP}
            trajectory.constant = {name: _moved(value, "cpu") for name, value in rest.items()}
        trajectory.calls.append(Call(changing, output[0].detach().to("cpu")))

    handle = transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        yield trajectory
    finally:
        handle.remove()


@torch.no_grad()
def velocity_errors(
    transformer: nn.Module,
    trajectory: Trajectory,
    device: torch.device,
    on_call: Callable[[], None] = lambda: None,
) -> Tensor:  # (T, B) float64
    """||v'(x_t) - v(x_t)|| / ||v(x_t)|| for each step and picture. Raises FormatError for an answer with NaN or Inf."""
    rows = []
    for step, call in enumerate(trajectory.calls):
        found = transformer(**trajectory.arguments(call, device))[0].to("cpu").double().flatten(1)
        if not torch.isfinite(found).all():
            raise FormatError(f"step {step + 1}: the velocity holds NaN or Inf")
        expected = call.velocity.double().flatten(1)
        rows.append((found - expected).norm(dim=1) / expected.norm(dim=1))
        on_call()
    return torch.stack(rows)
