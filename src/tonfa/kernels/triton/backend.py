"""The Triton backend: FP8 or INT8 activations per row, 4-bit weights expanded to the same format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from tonfa.kernels.gpu import reason_against_gpu
from tonfa.ops.activation import Activations
from tonfa.ops.table import Backend


def _reason_against(device: torch.device, activations: Activations) -> str | None:
    reason = reason_against_gpu(device)
    if reason is not None:
        return reason
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    capability = torch.cuda.get_device_capability(device)
    needed = (8, 9) if activations == "fp8" else (8, 0)
    if capability < needed:
        found, least = (".".join(map(str, c)) for c in (capability, needed))
        return f"activations={activations!r} need a GPU of compute capability {least}, this one has {found}"
    return None


def _table(activations: Activations) -> Mapping[str, Callable[..., Any]]:
    from tonfa.kernels.attention import sdpa
    from tonfa.kernels.triton.product import pack_product, product
    from tonfa.kernels.triton.product_gate_residual import product_gate_residual
    from tonfa.kernels.triton.product_gelu_quantize import product_gelu_quantize
    from tonfa.kernels.triton.product_norm_rope import product_norm_rope, product_norm_rope_into
    from tonfa.kernels.triton.quantize import norm_modulate_quantize, pack_input, quantize
    from tonfa.kernels.triton.w4a16 import pack_w4a16, pack_w4a16_group, w4a16, w4a16_group

    return {
        "pack_input": pack_input,
        "pack_product": partial(pack_product, activations=activations),
        "pack_w4a16": pack_w4a16,
        "pack_w4a16_group": pack_w4a16_group,
        "quantize": quantize,
        "product": product,
        "product_gelu_quantize": product_gelu_quantize,
        "product_norm_rope": product_norm_rope,
        "product_norm_rope_into": product_norm_rope_into,
        "product_gate_residual": product_gate_residual,
        "norm_modulate_quantize": norm_modulate_quantize,
        "w4a16": w4a16,
        "w4a16_group": w4a16_group,
        "attention": sdpa.attention,
    }


BACKEND = Backend("triton", ("fp8", "int8"), _reason_against, _table)
