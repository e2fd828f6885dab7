"""The ways to run the 4-bit model, and whether a model that is built so computes what the reference does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tonfa.bench import synthetic
from tonfa.dispatch import composed, default_activations, resolve_attention
from tonfa.errors import TonfaError
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import W4A16Linear
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel

CHECK_BOUND = 0.05
"""Relative L2 error of a small model's step against the reference backend with the same activations.

The CPU's kernels are at 0.007, by roundings in another order. A kind of layer without its bias, branch or smoothing in
every block is at 0.086 or more. FP8 attention adds 0.014.
"""
CHECK_SIZE = 256, 256
CHECK_TEXT = 64
SIXTEEN_BITS = "sdpa"


@dataclass(frozen=True)
class Variant:
    """One way to run the 4-bit model."""

    weights: str
    """Residency: "int4", or "fp8" for weights widened once."""
    activations: str
    rank: int
    graph: bool
    attention: str = SIXTEEN_BITS
    """One of `tonfa.ops.table.ATTENTIONS`."""
    fused: bool = True
    """False composes every fused op of the backend's quantize and product."""

    @property
    def name(self) -> str:
        """For people, and to tell records apart."""
        what = [f"tonfa {self.weights} weights", f"{self.activations} activations"]
        what += [] if self.attention == SIXTEEN_BITS else [f"{self.attention} attention"]
        what += [] if self.fused else ["nothing fused"]
        what += [] if self.graph else ["no graph"]
        return ", ".join(what if self.rank else [*what, "no low-rank branch"])


def variants(
    weights: Sequence[str],
    activations: str | None,
    rank: int,
    graph: bool,
    device: torch.device,
    attention: str = SIXTEEN_BITS,
) -> list[Variant]:
    """One for each residency of the weights."""
    chosen = activations or default_activations(device), rank, graph, resolve_attention(device, attention)
    return [Variant(w, *chosen) for w in weights]


def build(variant: Variant, config: Mapping[str, Any], device: torch.device, seed: int) -> SVDQFluxTransformer2DModel:
    """The 4-bit model of this variant with random weights."""
    model = synthetic.quantized_model(config, variant.rank, device, seed)
    model.set_weights(variant.weights).set_activations(variant.activations).set_attention(variant.attention)
    if not variant.fused:
        for layer in model.modules():
            if isinstance(layer, SVDQLinear | W4A16Linear):
                layer.change_kernels(composed)
    return model.set_cuda_graphs(variant.graph)


def small(config: Mapping[str, Any]) -> dict[str, Any]:
    """Two blocks of four heads at most: the reference computes it in a moment."""
    heads = min(4, config["num_attention_heads"])
    return {**config, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": heads}


def check(variant: Variant, config: Mapping[str, Any], device: torch.device, seed: int) -> float:
    """The error of a small model built as the variant is. Raises TonfaError if it is over CHECK_BOUND or not finite."""
    config = small(config)
    inputs = synthetic.step_inputs(config, *CHECK_SIZE, text_tokens=CHECK_TEXT, device=device)
    model = build(variant, config, device, seed)
    outputs = [model(**inputs)[0].float() for _ in range(3)]  # eager, recorded, replayed
    reference = synthetic.quantized_model(config, variant.rank, device, seed).set_cuda_graphs(False)
    expected = reference.set_activations(variant.activations, "reference")(**inputs)[0].float()
    error = max(float((found - expected).norm() / expected.norm()) for found in outputs)
    if not error <= CHECK_BOUND:
        raise TonfaError(
            f"{variant.name}: a small model is off by {error:.1%} from the reference backend, "
            f"{CHECK_BOUND:.0%} at most is allowed; no speed is recorded"
        )
    return error


def finite(output: Tensor, name: str) -> None:
    """Raise TonfaError for NaN or Inf."""
    if not bool(torch.isfinite(output).all()):
        raise TonfaError(f"{name}: the step's output is not finite; no speed is recorded")
