"""The list of ops, and what a backend must say of itself so that dispatch can choose and explain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tonfa.ops.activation import Activations

OPS: dict[str, str] = {
    "quantize": "smooth and quantize an input, with the low-rank down-projection",
    "product": "4-bit product with low-rank up-projection and bias",
    "product_gelu_quantize": "product, GELU, quantization of the next input",
    "product_norm_rope": "product, RMSNorm and RoPE of q and k, split into heads",
    "product_gate_residual": "product, gate and residual",
    "norm_modulate_quantize": "LayerNorm, modulation, quantization",
    "w4a16": "4-bit linear with 16-bit activations (modulations)",
    "attention": "softmax attention over all heads",
}
"""Every op by name. The fused ones fall back to compositions of `quantize` and `product`."""


@dataclass(frozen=True)
class Backend:
    """One way to compute the ops.

    `table` loads its kernels: a mapping from op names to callables, with `pack_input`, `pack_product` and `pack_w4a16`
    beside them, which turn canonical weights into what the kernels read. Importing the kernels happens inside, so that
    a backend whose packages are missing can still be listed.
    """

    name: str
    activations: tuple[Activations, ...]
    reason_against: Callable[[torch.device, Activations], str | None]
    """None if it is made for this device and this policy, otherwise why not and what would help."""
    table: Callable[[Activations], Mapping[str, Callable[..., Any]]]
    reason_to_wait: Callable[[torch.device], str | None] = lambda device: None
    """Why it is taken on this device only if it is asked for by name, although it can run; None if it need not be."""
    missing: Callable[[], str | None] = lambda: None
    """What it lacks on devices that it is made for, and how to get it: dispatch logs it and takes the next backend."""
