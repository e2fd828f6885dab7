"""The list of ops, and what a backend must say of itself so that dispatch can choose and explain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tonfa.ops.activation import Activations, ScaledFP8
from tonfa.ops.attention_fp8 import QuantizedHeads
from tonfa.ops.choice import parse

OPS: dict[str, str] = {
    "quantize": "smooth and quantize an input, with the low-rank down-projection",
    "quantize_fp8": "the same for what FP8 attention returns",
    "product": "4-bit product with low-rank up-projection and bias",
    "product_gelu_quantize": "product, GELU, quantization of the next input",
    "product_norm_rope": "product, RMSNorm and RoPE of q and k, split into heads",
    "product_gate_residual": "product, gate and residual",
    "norm_modulate_quantize": "LayerNorm, modulation, quantization",
    "w4a16": "4-bit linear with 16-bit activations (modulations)",
    "w4a16_group": "the same for several linears that read one input",
    "attention": "softmax attention over all heads",
}
"""Every op by name. Fused ones fall back to compositions of `quantize` and `product`, groups to one at a time."""


@dataclass(frozen=True)
class Backend:
    """One way to compute the ops.

    `table` loads its kernels: a mapping from op names to callables, with `pack_input`, `pack_product` and `pack_w4a16`
    beside them, which turn canonical weights into what the kernels read; `pack_w4a16_group`, if the backend needs it,
    prepares what `pack_w4a16` returned for `w4a16_group`. What else a backend may have is told by the attributes of
    `dispatch.Kernels` that may be None. Importing the kernels happens inside, so that a backend whose packages are
    missing can still be listed.
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


ATTENTIONS: dict[str, str] = {
    "sdpa": "in 16 bits, by the backend of the layers",
    "fp8": "in FP8 on GPUs that compute it natively",
}
"""The ways to compute attention that a user may choose."""

AUTO = "auto"
"""The choice that leaves it to the device: `kernels.attention.choices.automatic`."""

DEFAULT_ATTENTION = "auto"
"""What is taken where a user names none."""


def parse_attention(name: str) -> str:
    """The name itself; raises UnsupportedError if there is no such attention."""
    return parse("attention", name, (*ATTENTIONS, AUTO))


@dataclass(frozen=True)
class AttentionKernels:
    """An attention that was chosen in place of that of the layers' backend."""

    attention: Callable[..., Tensor]
    """Of q, k, v in 16 bits, the mask, and the weights of q's and of k's norms (see ops/attention_fp8.py)."""
    takes: Callable[[torch.Size, torch.device], bool]
    """Whether `attend` computes heads of this shape (B, H, L, D)."""
    attend: Callable[[QuantizedHeads, torch.dtype], ScaledFP8]
    """Of heads that the product has rounded, for a result that stands for this dtype."""


Residency = Literal["int4", "fp8"]
"""What of the weights stays in a device's memory: 4-bit codes alone, or FP8 as the kernels multiply it too."""

RESIDENCIES: tuple[Residency, ...] = get_args(Residency)


def parse_residency(name: str) -> Residency:
    """The name itself; raises UnsupportedError if there is no such form."""
    return parse("weights", name, RESIDENCIES)


@dataclass(frozen=True)
class AttentionChoice:
    """One of `ATTENTIONS`. `load` imports and returns its kernels; None stands for those of the layers' backend."""

    name: str
    reason_against: Callable[[torch.device], str | None]
    """None if it can run on this device, otherwise why not and what would help."""
    load: Callable[[], AttentionKernels] | None
