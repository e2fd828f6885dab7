"""Models of other families, tiny, with random weights and the outlier channels that make quantizing hard."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from tonfa.models.generic.plan import LinearRule, Plan

BLOCK = r"transformer_blocks\.\d+"
PIXART_PLAN = Plan(
    include=(
        rf"{BLOCK}\.attn[12]\.(to_[qkv]|to_out\.0)",
        rf"{BLOCK}\.ff\.net\.0\.proj",
        LinearRule(rf"{BLOCK}\.ff\.net\.2", unsigned=True),
    ),
)
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 128,
    "sample_size": 16,
    "patch_size": 2,
    "caption_channels": 64,
}
OUTLIERS = 4


def pixart(dtype: torch.dtype = torch.float32) -> PixArtTransformer2DModel:
    """Two blocks of 128 channels; a few channels of every modulated input are twenty times as large."""
    torch.manual_seed(0)
    model = PixArtTransformer2DModel(**PIXART).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.7 * parameter.shape[1] ** -0.5)
        if name.endswith("scale_shift_table") and parameter.shape[0] == 6:
            scales = parameter.data[[1, 4]]
            scales[:, :: parameter.shape[1] // OUTLIERS] = 20
            parameter.data[[1, 4]] = scales
    with torch.no_grad():
        for block in model.transformer_blocks:
            for linear in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v, block.ff.net[0].proj):
                linear.weight[:, :: linear.in_features // OUTLIERS] /= 5
    return model.requires_grad_(False).to(dtype)


def pixart_sample(seed: int, dtype: torch.dtype = torch.float32) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 4, 16, 16, generator=g).to(dtype)
    text = torch.randn(2, 24, 64, generator=g).to(dtype)
    timestep = torch.randint(0, 1000, (2,), generator=g)
    none = {"resolution": None, "aspect_ratio": None}
    return (latents,), {
        "encoder_hidden_states": text,
        "timestep": timestep,
        "added_cond_kwargs": none,
        "return_dict": False,
    }


def output(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    args, kwargs = pixart_sample(seed, dtype)
    with torch.no_grad():
        found: Tensor = model(*args, **kwargs)[0]
    return found.float()
