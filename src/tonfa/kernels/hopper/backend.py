"""The Hopper backend: FP8 activations on wgmma, 4-bit weights decoded on the way to it.

Layers that its kernels do not take (float32, ranks that are no multiple of 16) go through Triton's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tonfa.kernels.cuda import backend as cuda
from tonfa.kernels.route import route
from tonfa.kernels.triton import backend as triton
from tonfa.ops import fused
from tonfa.ops.activation import Activations, InputWeights, QuantizedActivation
from tonfa.ops.table import Backend
from tonfa.weights import SVDQWeights


def _reason_against(device: torch.device, activations: Activations) -> str | None:
    if device.type != "cuda":
        return f"it computes on Hopper GPUs, not on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it is written for sm_90, this GPU is sm_{capability[0]}{capability[1]}"
    return triton.BACKEND.reason_against(device, activations)


def _table(activations: Activations) -> Mapping[str, Callable[..., Any]]:
    from tonfa.kernels.hopper import product as products
    from tonfa.kernels.hopper import quantize as inputs

    theirs = triton.BACKEND.table(activations)

    def by_weights(ours: Callable[..., Any], op: str, place: int) -> Callable[..., Any]:
        return route(ours, theirs[op], (inputs.PackedInput, products.PackedProduct), place)

    quantize = by_weights(inputs.quantize, "quantize", 1)
    product = by_weights(products.product, "product", 1)

    def product_gelu_quantize(x: QuantizedActivation, w: Any, following: Any) -> Any:
        mine = isinstance(w, products.PackedProduct)
        if mine != isinstance(following, inputs.PackedInput):
            return quantize(fused.gelu(product(x, w)), following)
        kernel = products.product_gelu_quantize if mine else theirs["product_gelu_quantize"]
        return kernel(x, w, following)

    def pack_input(w: InputWeights) -> Any:
        mine = inputs.takes(w.proj_down.dtype, w.proj_down.shape[1])
        return (inputs.pack_input if mine else theirs["pack_input"])(w)

    def pack_product(w: SVDQWeights) -> Any:
        return (products.pack_product if inputs.takes(w.wscales.dtype, w.rank) else theirs["pack_product"])(w)

    return {
        **theirs,
        "pack_input": pack_input,
        "pack_product": pack_product,
        "quantize": quantize,
        "product": product,
        "norm_modulate_quantize": by_weights(inputs.norm_modulate_quantize, "norm_modulate_quantize", 3),
        "product_norm_rope": by_weights(products.product_norm_rope, "product_norm_rope", 1),
        "product_norm_rope_into": by_weights(products.product_norm_rope_into, "product_norm_rope_into", 1),
        "product_gelu_quantize": product_gelu_quantize,
        "product_gate_residual": by_weights(products.product_gate_residual, "product_gate_residual", 1),
    }


BACKEND = Backend("hopper", ("fp8",), _reason_against, _table, missing=cuda.missing)
