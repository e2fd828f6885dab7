"""The CUDA backend: INT4 activations on the INT4 tensor cores of Ampere and Ada, in kernels compiled where they run.

Layers whose weights are neither bfloat16 nor float16 are computed by the reference, and the log says so once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tonfa.kernels import reference
from tonfa.kernels.gpu import reason_against_nvidia
from tonfa.kernels.route import route
from tonfa.ops import fused
from tonfa.ops import w4a16 as w4a16_op
from tonfa.ops.activation import Activations
from tonfa.ops.table import Backend

NATIVE = ((8, 0), (8, 6), (8, 9))
EMULATED = ((9, 0),)

_logger = logging.getLogger(__name__)


def _reason_against(device: torch.device, activations: Activations) -> str | None:
    reason = reason_against_nvidia(device)
    if reason is not None:
        return reason
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


@lru_cache(maxsize=8)
def _warn_once(dtype: torch.dtype) -> None:
    _logger.warning("layers with %s weights are computed by the reference, slowly: take .to(torch.bfloat16)", dtype)


def _table(activations: Activations) -> Mapping[str, Callable[..., Any]]:
    from tonfa.kernels.cuda.kernel import ELEMENTS
    from tonfa.kernels.cuda.norm_modulate_quantize import norm_modulate_quantize
    from tonfa.kernels.cuda.product import PackedProduct, pack_product, product
    from tonfa.kernels.cuda.product_gate_residual import product_gate_residual
    from tonfa.kernels.cuda.product_gelu_quantize import product_gelu_quantize
    from tonfa.kernels.cuda.product_norm_rope import product_norm_rope, product_norm_rope_into
    from tonfa.kernels.cuda.quantize import PackedInput, pack_input, quantize
    from tonfa.kernels.cuda.w4a16 import PackedW4A16, pack_w4a16, w4a16, w4a16_group

    theirs = reference.table(activations)
    packed = (PackedInput, PackedProduct, PackedW4A16)
    primitives = SimpleNamespace(
        quantize=route(quantize, theirs["quantize"], packed, 1), product=route(product, theirs["product"], packed, 1)
    )

    def pack(op: str, ours: Callable[..., Any], dtype_of: Callable[[Any], torch.dtype]) -> Callable[..., Any]:
        def chosen(w: Any) -> Any:
            if dtype_of(w) in ELEMENTS:
                return ours(w)
            _warn_once(dtype_of(w))
            return theirs[op](w)

        return chosen

    def together(x: Tensor, parts: Sequence[Any]) -> tuple[Tensor, ...]:
        if all(isinstance(part, PackedW4A16) for part in parts):
            return w4a16_group(x, parts)
        return w4a16_op.group(theirs["w4a16"], x, parts)

    def fusion(kernel: Callable[..., Any], *places: int) -> Callable[..., Any]:
        return route(kernel, partial(getattr(fused, kernel.__name__), primitives), packed, *places)

    return {
        "pack_input": pack("pack_input", pack_input, lambda w: w.proj_down.dtype),
        "pack_product": pack("pack_product", pack_product, lambda w: w.wscales.dtype),
        "pack_w4a16": pack("pack_w4a16", pack_w4a16, lambda w: w.wscales.dtype),
        "quantize": primitives.quantize,
        "product": primitives.product,
        "product_gelu_quantize": fusion(product_gelu_quantize, 1, 2),
        "product_norm_rope": fusion(product_norm_rope, 1),
        "product_norm_rope_into": fusion(product_norm_rope_into, 1),
        "product_gate_residual": fusion(product_gate_residual, 1),
        "norm_modulate_quantize": fusion(norm_modulate_quantize, 3),
        "w4a16": route(w4a16, theirs["w4a16"], packed, 1),
        "w4a16_group": together,
        "attention": theirs["attention"],
    }


BACKEND = Backend("cuda", ("int4",), _reason_against, _table, _reason_to_wait, missing)
