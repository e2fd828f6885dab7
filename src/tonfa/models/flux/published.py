"""A model's native tensors as Nunchaku's own containers want them: one rank, shifted inputs behind a GELU, 1 in biases.

For models that are so already nothing changes. Those that came from a `nunchaku_lite` folder get zeros in narrower
branches, and biases with the corrections that they lack, rounded once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.checkpoint.nunchaku_layout import RANK_TILE
from tonfa.checkpoint.strict import dtype_name
from tonfa.errors import CheckpointError
from tonfa.models.flux.plan import flux_dims, flux_plan
from tonfa.plan import ModelPlan
from tonfa.weights import SVDQWeights

if TYPE_CHECKING:
    from tonfa.models.flux.export import QuantizedFlux


class PublishedTensors:
    """Native tensors by name. Raises CheckpointError for a model that Nunchaku's containers cannot hold."""

    def __init__(self, model: QuantizedFlux) -> None:
        if model.dtype.itemsize != 2:
            raise CheckpointError(
                f"{model.where}: its floats are {dtype_name(model.dtype)}, but Nunchaku's have 16 bits"
            )
        for linear in model.plan.linears():
            if linear.parts > 1:
                raise CheckpointError(
                    f"{model.where}: {linear.name} has a smoothing factor for each of {', '.join(linear.sources)}; "
                    "Nunchaku's containers have one for all three, so only native and nunchaku-lite can hold this model"
                )
        self.rank = max((linear.rank or model.rank for linear in model.plan.linears()), default=model.rank)
        if self.rank % RANK_TILE:
            raise CheckpointError(
                f"{model.where}: rank {self.rank} is no multiple of 16, which Nunchaku's kernels need"
            )
        self.plan: ModelPlan = flux_plan(flux_dims(model.config))
        self._model = model
        self._linears = {linear.name: linear for linear in model.plan.linears()}
        self._wanted = {linear.name: linear for linear in self.plan.linears()}

    def __getitem__(self, name: str) -> Tensor:
        module, _, field = name.rpartition(".")
        if module in self._linears and field == "bias":
            return self._bias(module)
        tensor = self._model.source[name]
        if field in ("proj_down", "proj_up"):
            return functional.pad(tensor, (0, self.rank - tensor.shape[1]))
        return tensor

    def _bias(self, name: str) -> Tensor:
        linear, wanted = self._linears[name], self._wanted[name]
        if linear.unsigned != wanted.unsigned:
            weights = self._model.linear(linear)
            assert isinstance(weights, SVDQWeights)
            return weights.shifted().bias.to(self._model.dtype)
        bias = self._model.source[f"{name}.bias"]
        for start, stop in wanted.plus_one if not linear.plus_one else ():
            bias = torch.cat((bias[:start], bias[start:stop] + 1, bias[stop:]))
        return bias
