"""FLUX transformers with random weights, made where they will run, and the inputs of one of their steps.

Weights have the proportions that quantizing a trained model gives and, as trained ones, a few outlier channels: their
inputs are ten times as large, and the smoothing takes a part of that away. Zeros would draw less power and run faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from tonfa.layers.dense import DenseLinear
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import Modulation, W4A16Linear
from tonfa.models.flux.blocks import SingleBlock
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel

FULL: dict[str, Any] = {
    "in_channels": 128,
    "out_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
"""FLUX.1-Depth-dev: the control image's channels stand beside the latent's."""

DEMO: dict[str, Any] = {
    **FULL,
    "num_layers": 3,
    "num_single_layers": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 128,
}
"""The bundled demo model."""

PATCH = 16
"""Pixels a side of one image token."""

_OUTLIER_EVERY, _OUTLIER = 67, 10.0


def outlier_channels(channels: int) -> slice:
    """The channels that are large."""
    return slice(5, channels, _OUTLIER_EVERY)


def outlier_input(
    rows: int, channels: int, generator: torch.Generator, device: torch.device | str = "cpu", factor: float = 30.0
) -> Tensor:
    """(rows, channels) bf16: Gaussian with a few channels `factor` times as large, as diffusion transformers have."""
    x = torch.randn(rows, channels, generator=generator, device=device)
    x[:, outlier_channels(channels)] *= factor
    return x.bfloat16()


def random_linear(
    n: int, k: int, rank: int, device: torch.device, generator: torch.Generator, activations: str | None = None
) -> SVDQLinear:
    """One quantized linear with random weights; `generator` is of `device`."""
    layer = SVDQLinear(k, n, rank, device=device, activations=activations)
    _fill_svdq(layer, generator)
    return layer


def quantized_model(
    config: Mapping[str, Any], rank: int, device: torch.device, seed: int = 0
) -> SVDQFluxTransformer2DModel:
    """A 4-bit model of this configuration in bf16, every tensor written on `device`; rank 0 has no low-rank branch."""
    with torch.device("meta"):
        model: SVDQFluxTransformer2DModel = SVDQFluxTransformer2DModel(**config, quantization_config={"rank": rank})
    return _filled(model, device, seed)


def dense_model(config: Mapping[str, Any], device: torch.device, seed: int = 0) -> FluxTransformer2DModel:
    """Diffusers' own model of this configuration in bf16."""
    return _filled(unfilled_dense_model(config), device, seed)


def unfilled_dense_model(config: Mapping[str, Any]) -> FluxTransformer2DModel:
    """Diffusers' own model on the meta device, to be given weights."""
    with torch.device("meta"):
        return FluxTransformer2DModel(**config)


def _filled(model: Any, device: torch.device, seed: int) -> Any:
    generator = torch.Generator(device).manual_seed(seed)
    nn.Module.to(model, torch.bfloat16)
    model.to_empty(device=device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SVDQLinear):
                _fill_svdq(module, generator)
            elif isinstance(module, W4A16Linear):
                _fill_w4a16(module, generator)
            elif isinstance(module, nn.Linear | DenseLinear):
                _fill_dense(module, generator)
            elif isinstance(module, nn.RMSNorm) or type(module).__name__ == "RMSNorm":  # Diffusers has its own
                module.weight.uniform_(0.5, 1.5, generator=generator)
        for module in model.modules():
            if isinstance(module, Modulation):
                _fill_modulation_bias(module)
            elif isinstance(module, SingleBlock) and isinstance(module.ff.up, SVDQLinear):
                # They read one input, so the quantizer gives them one smoothing.
                module.ff.up.smooth_factor.copy_(module.attn.to_qkv.get_parameter("smooth_factor"))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def _fill_svdq(layer: SVDQLinear, generator: torch.Generator) -> None:
    """Residual and branch of about the same size; the output of a unit Gaussian is about one."""
    k, rank = layer.in_features, max(1, layer.rank)
    layer.qweight.random_(0, 256, generator=generator)
    layer.wscales.uniform_(0.05, 0.15, generator=generator).mul_(k**-0.5)
    layer.smooth_factor.uniform_(0.3, 2.0, generator=generator)
    layer.smooth_factor[outlier_channels(k)] *= _OUTLIER**0.5
    layer.proj_down.normal_(generator=generator).mul_(k**-0.5)
    layer.proj_up.normal_(generator=generator).mul_(0.5 * rank**-0.5)
    layer.bias.normal_(generator=generator).mul_(0.3)


def _fill_w4a16(layer: W4A16Linear, generator: torch.Generator) -> None:
    layer.qweight.random_(0, 256, generator=generator)
    layer.wscales.uniform_(0.01, 0.03, generator=generator).mul_(layer.in_features**-0.5)
    layer.wzeros.copy_(layer.wscales * -7.5)
    layer.bias.normal_(generator=generator).mul_(0.3)


def _fill_modulation_bias(modulation: Modulation) -> None:
    """Scales around one, as 4-bit checkpoints hold them, and ten for outlier channels."""
    if not isinstance(modulation.linear, W4A16Linear):
        return
    chunks = modulation.linear.bias.view(modulation.chunks, -1)
    for i in {1, modulation.chunks - 2}:
        chunks[i] += 1
        chunks[i, outlier_channels(modulation.hidden_size)] *= _OUTLIER


def _fill_dense(layer: nn.Linear | DenseLinear, generator: torch.Generator) -> None:
    k = layer.in_features
    layer.weight.normal_(generator=generator).mul_(0.5 * k**-0.5)
    layer.weight[:, outlier_channels(k)] *= 3
    if layer.bias is not None:
        layer.bias.normal_(generator=generator).mul_(0.1)


def tokens(height: int, width: int) -> int:
    """Image tokens of a picture in pixels."""
    return (height // PATCH) * (width // PATCH)


def step_inputs(
    config: Mapping[str, Any],
    height: int,
    width: int,
    batch: int = 1,
    text_tokens: int = 512,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
) -> dict[str, Any]:
    """Inputs of a step as FLUX's pipelines pass them; drawn on the CPU, so the same on every device.

    1000 times this timestep and guidance is exact in bf16, so that float32 computes the same step.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    rows, columns = height // PATCH, width // PATCH
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None]
    inputs: dict[str, Any] = {
        "hidden_states": random(batch, rows * columns, config["in_channels"]),
        "encoder_hidden_states": random(batch, text_tokens, config["joint_attention_dim"]),
        "pooled_projections": random(batch, config["pooled_projection_dim"]),
        "timestep": torch.full((batch,), 0.5, device=device, dtype=dtype),
        "img_ids": ids.view(-1, 3).to(device, dtype),
        "txt_ids": torch.zeros(text_tokens, 3, device=device, dtype=dtype),
        "return_dict": False,
    }
    if config.get("guidance_embeds"):
        inputs["guidance"] = torch.full((batch,), 4.0, device=device, dtype=torch.float32)
    return inputs
