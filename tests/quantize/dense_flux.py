"""A tiny dense FLUX on disk, its plan, and a source that counts what is alive."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from tonfa.checkpoint.tensors import TensorFolder, read_json
from tonfa.models.flux.plan import FluxDims, flux_plan

HIDDEN = 128
CONFIG = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "in_channels": 128,
    "out_channels": 64,
    "axes_dims_rope": (16, 24, 24),
}
PLAN = flux_plan(FluxDims(HIDDEN, 1, 1, True))


def save_dense(folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)


def dense_config(folder: Path) -> dict[str, Any]:
    return read_json(folder / "config.json")


class CountingSource(TensorFolder):
    """Knows how many bytes of the tensors that it handed out were alive at once, and what was read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[str] = []
        self.alive = self.most = 0

    def __getitem__(self, name: str) -> Tensor:
        tensor = super().__getitem__(name).clone()
        self.reads.append(name)
        self.alive += tensor.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(tensor, self._freed, tensor.nbytes)
        return tensor

    def _freed(self, size: int) -> None:
        self.alive -= size
