"""The CPU backend: INT8 activations, 4-bit weights kept packed, integer products through `torch._int_mm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from tonfa.ops.activation import Activations
from tonfa.ops.table import Backend


def _reason_against(device: torch.device, activations: Activations) -> str | None:
    if device.type != "cpu":
        return f"it computes on the CPU, not on {device.type}"
    return None


def _missing() -> str | None:
    return None if find_spec("numba") else "numba is not installed: pip install 'tonfa[cpu]'"


def _table(activations: Activations) -> Mapping[str, Callable[..., Any]]:
    from tonfa.kernels.cpu.norm_modulate_quantize import norm_modulate_quantize
    from tonfa.kernels.cpu.product import pack_product, product
    from tonfa.kernels.cpu.product_gate_residual import product_gate_residual
    from tonfa.kernels.cpu.product_gelu_quantize import product_gelu_quantize
    from tonfa.kernels.cpu.product_norm_rope import product_norm_rope
    from tonfa.kernels.cpu.quantize import pack_input, quantize
    from tonfa.kernels.cpu.w4a16 import pack_w4a16, w4a16
    from tonfa.ops import attention

    return {
        "pack_input": pack_input,
        "pack_product": pack_product,
        "pack_w4a16": pack_w4a16,
        "quantize": quantize,
        "product": product,
        "product_gelu_quantize": product_gelu_quantize,
        "product_norm_rope": product_norm_rope,
        "product_gate_residual": product_gate_residual,
        "norm_modulate_quantize": norm_modulate_quantize,
        "w4a16": w4a16,
        "attention": attention.reference,
    }


BACKEND = Backend("cpu", ("int8",), _reason_against, _table, missing=_missing)
