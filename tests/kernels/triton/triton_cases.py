"""Layers, inputs and exact results that the tests of the Triton kernels share."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from support import outlier_input, random_weights
from tonfa.kernels.triton.quantize import PackedInput, pack_input, quantize
from tonfa.ops import product as op
from tonfa.ops.activation import Activations, InputWeights, QuantizedActivation
from tonfa.weights import SVDQWeights

POLICIES: tuple[Activations, ...] = ("fp8", "int8")

DTYPES = (torch.bfloat16, torch.float16) if torch.cuda.is_available() else (torch.float16,)
"""The interpreter computes bfloat16 wrongly."""


def layer(
    n: int,
    k: int,
    rank: int,
    device: torch.device,
    generator: torch.Generator,
    dtype: torch.dtype,
    *,
    unsigned: bool = False,
) -> SVDQWeights:
    """Random weights with a row of zeros and negative scales."""
    w = random_weights(n, k, rank, generator=generator, dtype=dtype, unsigned=unsigned)
    w.wscales[:, n // 2] *= -1
    w.qweight[n // 3] = 0
    return replace(w, **{name: t.to(device) for name, t in w.tensors().items()})


def adversarial_input(
    rows: int, channels: int, generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Outlier channels, a row of zeros, a row with one huge value, a row of the smallest numbers."""
    x = outlier_input(rows, channels, generator, dtype)
    if rows > 3:
        x[1] = 0
        x[2, channels // 2] = 30000
        least = max(torch.finfo(dtype).smallest_normal, 1e-30)
        x[3] = least * torch.randint(-3, 4, (channels,), generator=generator) / 4
    return x.to(device)


def input_weights(w: SVDQWeights, activations: Activations) -> InputWeights:
    return InputWeights(w.smooth_factor, w.proj_down, w.unsigned, activations)


def packed_input(w: SVDQWeights, activations: Activations) -> PackedInput:
    return pack_input(input_weights(w, activations))


def quantized(x: Tensor, w: SVDQWeights, activations: Activations) -> QuantizedActivation:
    return quantize(x, packed_input(w, activations))


def exact_product(x: QuantizedActivation, w: SVDQWeights, activations: Activations) -> Tensor:
    """float64 of the op's own input."""
    return op.reference(x, w.unshifted(), activations, torch.float64)


def plain_product(x: QuantizedActivation, w: SVDQWeights, activations: Activations) -> Tensor:
    """Plain PyTorch with the kernel's arithmetic of the low-rank branch: bf16 where input and weights are, or TF32."""
    assert x.lowrank is not None
    if x.dtype == w.proj_up.dtype == torch.bfloat16:
        x = replace(x, lowrank=x.lowrank.bfloat16().float())
    elif x.dtype != torch.float32:
        bits = x.lowrank.contiguous().view(torch.int32)
        x = replace(x, lowrank=(bits & ~0x1FFF).view(torch.float32))
    return op.reference(x, w.unshifted(), activations)
