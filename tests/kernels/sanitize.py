"""Starts every kernel of the CUDA and Hopper backends on small, ragged shapes, for compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/kernels/sanitize.py

Arguments are backends: `cuda`, `hopper`, `triton`; without any, the first two if they run on this GPU. Inputs are made,
and results compared with the reference, on the CPU, so that hardly another kernel is started. Memory must not be
cached: what lies behind a tensor has to be out of bounds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support import outlier_input, random_modulation, random_weights, relative_error
from tonfa.dispatch import Kernels, bind
from tonfa.errors import UnsupportedError
from tonfa.ops.activation import InputWeights
from tonfa.weights import SVDQWeights

POLICIES = {"cuda": "int4", "hopper": "fp8", "triton": "int8"}
DEFAULT = ("cuda", "hopper")
BATCH, LENGTH, HEADS = 2, 65, 1
ROWS, HIDDEN, INNER = BATCH * LENGTH, 1152, 320
"""Two tiles of rows, the second nearly empty; more steps along K than any pipeline has stages."""
BOUND = 0.03
"""Relative error against the reference: a few codes fall on the other side of a rounding."""


def to(device: str, *values: Any) -> list[Any]:
    """Tensors and weights on a device."""
    moved: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            moved.append(value.to(device))
        else:
            moved.append(replace(value, **{name: t.to(device) for name, t in value.tensors().items()}))
    return moved


def ops(kernels: Kernels, device: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every op with the same inputs on each device, by name."""
    generator = torch.Generator().manual_seed(0)
    qkv = random_weights(3 * HEADS * 128, HIDDEN, generator=generator)
    up = random_weights(INNER, HIDDEN, generator=generator)
    down = random_weights(128, INNER, 48, generator=generator, unsigned=True)
    out = random_weights(200, HIDDEN, generator=generator)
    modulation, other = (random_modulation(n, HIDDEN, generator=generator) for n in (384, 20))
    x = outlier_input(ROWS, HIDDEN, generator)
    scale, shift = (torch.randn(BATCH, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    residual = torch.randn(BATCH, LENGTH, 200, generator=generator).bfloat16()
    gate = torch.randn(BATCH, 200, generator=generator).bfloat16()
    norms = (torch.rand(2, 128, generator=generator) + 0.5).bfloat16()
    angles = torch.rand(LENGTH, 64, generator=generator).repeat_interleave(2, dim=1) * 6
    cos, sin = angles.cos(), angles.sin()
    qkv, up, down, out, modulation, other = to(device, qkv, up, down, out, modulation, other)
    x, scale, shift, residual, gate, norms, cos, sin = to(device, x, scale, shift, residual, gate, norms, cos, sin)

    def inputs(w: SVDQWeights) -> Any:
        return kernels.pack_input(InputWeights(w.smooth_factor, w.proj_down, w.unsigned, kernels.activations))

    def norm_modulate_quantize() -> Tensor:
        q = kernels.norm_modulate_quantize(x.view(BATCH, LENGTH, HIDDEN), scale, shift, inputs(up))
        return kernels.product(q, kernels.pack_product(up))

    def product_gelu_quantize() -> Tensor:
        q = kernels.quantize(x, inputs(up))
        q = kernels.product_gelu_quantize(q, kernels.pack_product(up), inputs(down))
        return kernels.product(q, kernels.pack_product(down))

    def product_norm_rope() -> Tensor:
        q = kernels.quantize(x, inputs(qkv))
        return torch.stack(kernels.product_norm_rope(q, kernels.pack_product(qkv), norms[0], norms[1], (cos, sin)))

    def product_gate_residual() -> Tensor:
        q = kernels.quantize(x, inputs(out))
        return kernels.product_gate_residual(q, kernels.pack_product(out), residual, gate)

    def w4a16_group() -> Tensor:
        packed = [kernels.pack_w4a16(w) for w in (modulation, other)]
        return torch.cat(kernels.w4a16_group(x[:5], kernels.pack_w4a16_group(packed)), dim=1)

    for op in (norm_modulate_quantize, product_gelu_quantize, product_norm_rope, product_gate_residual, w4a16_group):
        yield op.__name__, op


def main(names: list[str]) -> int:
    """0 if every op of every backend agrees with the reference."""
    failed = 0
    for name in names or DEFAULT:
        policy = POLICIES[name]
        try:
            kernels = bind(torch.device("cuda"), policy, name)
        except UnsupportedError as reason:
            print(f"{name}: not run, {reason}")
            failed += name in names
            continue
        reference = ops(bind(torch.device("cpu"), policy, "reference"), "cpu")
        for (op, ours), (_, theirs) in zip(ops(kernels, "cuda"), reference, strict=True):
            start = time.perf_counter()
            error = relative_error(ours().cpu(), theirs())
            failed += not error < BOUND
            print(f"{name} {op}: off by {error:.1e}, {time.perf_counter() - start:.1f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
