"""The Hopper backend: FP8 activations and 4-bit weights expanded to FP8, on wgmma.

Layers that its kernels do not take (float32, ranks that are no multiple of 16) go through Triton's. Modulations take
the kernel of the CUDA backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tonfa.kernels.cuda import backend as cuda
from tonfa.kernels.cuda.kernel import ELEMENTS
from tonfa.kernels.gpu import reason_against_nvidia
from tonfa.kernels.route import route
from tonfa.kernels.triton import backend as triton
from tonfa.ops import fused
from tonfa.ops.activation import Activations, InputWeights, QuantizedActivation, ScaledFP8
from tonfa.ops.table import Backend
from tonfa.weights import SVDQWeights, W4A16Weights


def _reason_against(device: torch.device, activations: Activations) -> str | None:
    reason = reason_against_nvidia(device)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"it is written for sm_90, this GPU is sm_{capability[0]}{capability[1]}"
    return triton.BACKEND.reason_against(device, activations)


def _table(activations: Activations) -> Mapping[str, Callable[..., Any]]:
    from tonfa.kernels.cuda import w4a16 as modulations
    from tonfa.kernels.hopper import inputs
    from tonfa.kernels.hopper import packed_product as weights
    from tonfa.kernels.hopper import product as products
    from tonfa.kernels.hopper import product_norm_rope as heads
    from tonfa.kernels.hopper import quantize as quantizers
    from tonfa.kernels.hopper.product_norm_rope_fp8 import product_norm_rope_fp8

    theirs = triton.BACKEND.table(activations)

    packed = (inputs.PackedInput, weights.PackedProduct, modulations.PackedW4A16, tuple)

    def by_weights(ours: Callable[..., Any], op: str, place: int) -> Callable[..., Any]:
        return route(ours, theirs[op], packed, place)

    quantize = by_weights(quantizers.quantize, "quantize", 1)
    product = by_weights(products.product, "product", 1)

    def other_quantize_fp8(x: ScaledFP8, w: Any) -> Any:
        return theirs["quantize"](x.dequantize(), w)

    def product_gelu_quantize(x: QuantizedActivation, w: Any, following: Any) -> Any:
        mine = isinstance(w, weights.PackedProduct)
        if mine != isinstance(following, inputs.PackedInput):
            return quantize(fused.gelu(product(x, w)), following)
        kernel = products.product_gelu_quantize if mine else theirs["product_gelu_quantize"]
        return kernel(x, w, following)

    def pack_input(w: InputWeights) -> Any:
        mine = inputs.takes(w.proj_down.dtype, w.proj_down.shape[1])
        return (inputs.pack_input if mine else theirs["pack_input"])(w)

    def pack_product(w: SVDQWeights) -> Any:
        return (weights.pack_product if inputs.takes(w.wscales.dtype, w.rank) else theirs["pack_product"])(w)

    def pack_w4a16(w: W4A16Weights) -> Any:
        return (modulations.pack_w4a16 if w.wscales.dtype in ELEMENTS else theirs["pack_w4a16"])(w)

    def pack_w4a16_group(parts: Sequence[Any]) -> Any:
        mine = all(isinstance(part, modulations.PackedW4A16) for part in parts)
        return tuple(parts) if mine else theirs["pack_w4a16_group"](parts)

    return {
        **theirs,
        "pack_input": pack_input,
        "pack_product": pack_product,
        "pack_product_expanded": weights.pack_product_expanded,
        "pack_w4a16": pack_w4a16,
        "pack_w4a16_group": pack_w4a16_group,
        "w4a16": by_weights(modulations.w4a16, "w4a16", 1),
        "w4a16_group": by_weights(modulations.w4a16_group, "w4a16_group", 1),
        "quantize": quantize,
        "quantize_fp8": route(quantizers.quantize_fp8, other_quantize_fp8, packed, 1),
        "product": product,
        "norm_modulate_quantize": by_weights(quantizers.norm_modulate_quantize, "norm_modulate_quantize", 3),
        "product_norm_rope": by_weights(heads.product_norm_rope, "product_norm_rope", 1),
        "product_norm_rope_into": by_weights(heads.product_norm_rope_into, "product_norm_rope_into", 1),
        "product_norm_rope_fp8": product_norm_rope_fp8,
        "product_gelu_quantize": product_gelu_quantize,
        "product_gate_residual": by_weights(products.product_gate_residual, "product_gate_residual", 1),
    }


BACKEND = Backend("hopper", ("fp8",), _reason_against, _table, missing=cuda.missing)
