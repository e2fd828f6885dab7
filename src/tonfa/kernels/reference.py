"""The reference backend: every op as its specification in plain PyTorch, on any device. Right first, fast never."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from tonfa.kernels.gpu import reason_against_gpu
from tonfa.ops import attention, product, quantize, w4a16
from tonfa.ops.activation import ACTIVATIONS, Activations, InputWeights
from tonfa.ops.table import Backend
from tonfa.weights import SVDQWeights, W4A16Weights


def _pack_input(w: InputWeights) -> InputWeights:
    return w


def _pack_product(w: SVDQWeights, activations: Activations) -> SVDQWeights:
    return w if activations == "int4" else w.unshifted()


def _pack_w4a16(w: W4A16Weights) -> W4A16Weights:
    return w


def table(activations: Activations) -> Mapping[str, Callable[..., Any]]:
    """The specification of every op that is no composition."""
    return {
        "pack_input": _pack_input,
        "pack_product": partial(_pack_product, activations=activations),
        "pack_w4a16": _pack_w4a16,
        "quantize": quantize.reference,
        "product": partial(product.reference, activations=activations),
        "w4a16": w4a16.reference,
        "attention": attention.reference,
    }


def _reason_against(device: torch.device, activations: Activations) -> str | None:
    if device.type == "cuda":
        return reason_against_gpu(device)
    return "the meta device computes nothing" if device.type == "meta" else None


BACKEND = Backend("reference", ACTIVATIONS, _reason_against, table)
