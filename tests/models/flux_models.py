"""Small FLUX models with random weights, and the inputs of one of their steps."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

SMALL = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 64,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 24,
    "axes_dims_rope": (8, 28, 28),
}
VARIANTS = {
    "dev": {"in_channels": 64, "guidance_embeds": True},
    "schnell": {"in_channels": 64, "guidance_embeds": False},
    "depth": {"in_channels": 128, "out_channels": 64, "guidance_embeds": True},
    "fill": {"in_channels": 384, "out_channels": 64, "guidance_embeds": True},
}


def dense_model(*, dtype: torch.dtype = torch.float32, **overrides: object) -> FluxTransformer2DModel:
    """A small Diffusers transformer with random weights large enough for every part to matter."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**{**SMALL, **VARIANTS["depth"], **overrides}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    for name, parameter in model.named_parameters():
        if "norm_q" in name or "norm_k" in name or "norm_added" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    torch.nn.Module.to(model, dtype)  # ModelMixin's own `to` warns about a list that is empty here
    return model


def inputs(
    model: torch.nn.Module,
    batch: int = 1,
    image: tuple[int, int] = (5, 7),
    text: int = 13,
    dtype: torch.dtype = torch.float32,
    references: int = 0,
) -> dict[str, Tensor]:
    """Inputs of a step: token counts not divisible by 16, a timestep and guidance of its own for each sample.

    1000 times these timesteps and guidances is exact in bfloat16, so that no dtype sees another step.
    """
    config, generator = model.config, torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    height, width = image
    grid = torch.zeros(height, width, 3)
    grid[..., 1] = torch.arange(height)[:, None]
    grid[..., 2] = torch.arange(width)[None]
    ids = [grid.view(-1, 3)]
    for i in range(references):  # Kontext: tokens of a reference image, told apart by the first axis
        ids.append(ids[0].clone())
        ids[-1][:, 0] = i + 1
    img_ids = torch.cat(ids)
    result = {
        "hidden_states": random(batch, len(img_ids), config.in_channels),
        "encoder_hidden_states": random(batch, text, config.joint_attention_dim),
        "pooled_projections": random(batch, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5, 0.25, 0.125])[:batch].to(dtype),
        "img_ids": img_ids,
        "txt_ids": torch.zeros(text, 3),
    }
    if config.guidance_embeds:
        result["guidance"] = torch.tensor([4.0, 2.0, 1.0])[:batch]
    return result


def run(model: torch.nn.Module, values: dict[str, object]) -> Tensor:
    """One step without gradients, on the model's device; the result on the CPU."""
    device = model.device
    values = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
    with torch.no_grad():
        return model(**values, return_dict=False)[0].cpu()
