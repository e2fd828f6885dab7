"""Which module each planned linear of FLUX is: 4-bit as the checkpoint's configuration says, or 16-bit throughout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tonfa.checkpoint import native
from tonfa.checkpoint.deviations import LAYERS, with_deviations
from tonfa.layers.dense import DenseLinear
from tonfa.layers.fused import FusedLinear
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import Modulation, W4A16Linear
from tonfa.layers.stacked import StackedLinear
from tonfa.models.flux.blocks import Layers
from tonfa.models.flux.plan import flux_dims, flux_plan
from tonfa.plan import ModelPlan


class DenseLayers:
    """16-bit weights."""

    def linear(self, name: str, in_features: int, out_features: int) -> FusedLinear:
        """A dense linear."""
        return DenseLinear(in_features, out_features)

    def modulation(self, name: str, hidden_size: int, chunks: int) -> Modulation:
        """A dense modulation."""
        return Modulation(hidden_size, chunks, DenseLinear(hidden_size, chunks * hidden_size))


class QuantizedLayers:
    """4-bit weights as planned; `rank` is that of linears without one of their own."""

    def __init__(self, plan: ModelPlan, rank: int) -> None:
        self._plans = {linear.name: linear for linear in plan.linears()}
        self._rank = rank

    def linear(self, name: str, in_features: int, out_features: int) -> FusedLinear:
        """A linear with a low-rank branch, or several whose outputs are joined."""
        plan = self._plans[name]
        rank, width = plan.rank or self._rank, out_features // plan.parts
        parts = [SVDQLinear(in_features, width, rank, unsigned=plan.unsigned) for _ in range(plan.parts)]
        return parts[0] if len(parts) == 1 else StackedLinear(parts)

    def modulation(self, name: str, hidden_size: int, chunks: int) -> Modulation:
        """A modulation with 16-bit activations."""
        linear = W4A16Linear(hidden_size, chunks * hidden_size)
        return Modulation(hidden_size, chunks, linear, plus_one=bool(self._plans[name].plus_one))


def configured_plan(config: Mapping[str, Any]) -> ModelPlan:
    """The plan of a 4-bit model of this configuration. Raises CheckpointError for what means nothing in it."""
    return with_deviations(flux_plan(flux_dims(config)), config["quantization_config"].get(LAYERS), native.CONFIG)


def layers_of(config: Mapping[str, Any]) -> Layers:
    """The layers of a model of this configuration."""
    quantization = config["quantization_config"]
    if quantization is None:
        return DenseLayers()
    return QuantizedLayers(configured_plan(config), int(quantization["rank"]))
