"""The CUDA backend: INT4 activations on the INT4 tensor cores of Ampere and Ada, in kernels compiled where they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tonfa.ops.activation import Activations
from tonfa.ops.table import Backend

NATIVE = ((8, 0), (8, 6), (8, 9))
EMULATED = ((9, 0),)


def _reason_against(device: torch.device, activations: Activations) -> str | None:
    if device.type != "cuda":
        return f"it computes on NVIDIA GPUs, not on {device.type}"
    if torch.version.cuda is None:
        return "this build of PyTorch has no CUDA: install one from https://pytorch.org"
    capability = torch.cuda.get_device_capability(device)
    if capability not in NATIVE + EMULATED:
        major, minor = capability
        return f"sm_{major}{minor} has no INT4 tensor cores (sm_80, sm_86 and sm_89 have): choose activations='int8'"
    return None


def _reason_to_wait(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) in NATIVE:
        return None
    return f"only if asked for by backend='cuda': sm_{major}{minor} emulates INT4 products, exact but slow"


def missing() -> str | None:
    """What keeps kernels from being compiled or loaded here, and how to get it; None if nothing does."""
    from tonfa.kernels.cuda import compiler, launch

    return compiler.problem() or launch.problem()


def _table(activations: Activations) -> Mapping[str, Callable[..., Any]]:
    from tonfa.kernels.cuda.norm_modulate_quantize import norm_modulate_quantize
    from tonfa.kernels.cuda.product import pack_product, product
    from tonfa.kernels.cuda.product_gate_residual import product_gate_residual
    from tonfa.kernels.cuda.product_gelu_quantize import product_gelu_quantize
    from tonfa.kernels.cuda.product_norm_rope import product_norm_rope
    from tonfa.kernels.cuda.quantize import pack_input, quantize
    from tonfa.kernels.cuda.w4a16 import pack_w4a16, w4a16
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


BACKEND = Backend("cuda", ("int4",), _reason_against, _table, _reason_to_wait, missing)
