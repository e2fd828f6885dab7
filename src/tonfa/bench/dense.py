"""What a 4-bit step is compared with: Diffusers' 16-bit model, eager and compiled, and torchao's FP8."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from tonfa.bench import synthetic
from tonfa.errors import UnsupportedError

EAGER, EAGER_CUDNN, COMPILED, TORCHAO = "bf16-eager", "bf16-eager-cudnn", "bf16-compiled", "torchao-fp8-compiled"
DENSE_BASELINES = (EAGER, COMPILED, TORCHAO)
"""What people run; EAGER_CUDNN tells how much of it the choice of attention is."""
COMPILING = (COMPILED, TORCHAO)


def missing(name: str, device: torch.device) -> str | None:
    """Why this baseline cannot run here; None if it can."""
    if name != TORCHAO:
        return None
    if find_spec("torchao") is None:
        return "torchao is not installed (pip install torchao)"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        return f"{device} multiplies no FP8"
    return None


class DenseModels:
    """One set of 16-bit weights, and the baselines made of it."""

    def __init__(self, config: Mapping[str, Any], device: torch.device, seed: int = 0) -> None:
        self._config, self._device = dict(config), device
        self._eager = synthetic.dense_model(config, device, seed)
        self._eager.set_attention_backend("native")

    def build(self, name: str) -> FluxTransformer2DModel:
        """The baseline of this name, if it is not `missing`; compilation happens in its first step.

        The others share the eager model's tensors; torchao's replaces the weights of its blocks' linears.
        """
        if name == EAGER:
            return self._eager
        model = synthetic.unfilled_dense_model(self._config)
        model.load_state_dict(self._eager.state_dict(), assign=True)
        model.requires_grad_(False).eval()
        if name == TORCHAO:
            _to_fp8(model)
        model.set_attention_backend("_native_cudnn" if self._device.type == "cuda" else "native")
        if name in COMPILING:
            model.compile_repeated_blocks(fullgraph=True, dynamic=False)  # for each size, as a first compilation is
        # Diffusers keeps the last backend for all models that name none, beside the model's own.
        self._eager.set_attention_backend("native")
        return model


def _to_fp8(model: FluxTransformer2DModel) -> None:
    """Dynamic row-wise FP8 of the linears in the blocks, as torchao's users set it."""
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise UnsupportedError(f"baseline {TORCHAO}: this torchao cannot be used: {error}") from error

    def in_a_block(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and "transformer_blocks." in name

    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=in_a_block)


def attention_backend(name: str, device: torch.device) -> str:
    """The attention that this baseline asks Diffusers for."""
    return "cudnn" if name != EAGER and device.type == "cuda" else "sdpa"
