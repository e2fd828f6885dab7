"""What 4-bit recipes are measured between: plain rounding without smoothing or branch, of linears and of whole models.

| bracket | weights | activations | modulations |
|---|---|---|---|
| `rtn` | INT4 in groups of 64, to nearest | as asked for; "int4" is W4A4 | as tonfa's, asymmetric W4A16 |
| `nf4-weight-only` | NF4 in groups of 64 | 16 bits | NF4 |
| `int8-w8a8` | INT8, a scale a row | INT8, a scale a token | W8A8 |
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tonfa.formats import INT4, INT8
from tonfa.models.flux.plan import flux_dims, flux_plan
from tonfa.ops.activation import Activations
from tonfa.plan import LinearPlan
from tonfa.quantizer.judge import quantized_input, widened
from tonfa.quantizer.modulation import quantize_modulation

BRACKETS = ("rtn", "nf4-weight-only", "int8-w8a8")
# The quantiles of a normal distribution that QLoRA's NF4 uses (arXiv 2305.14314, appendix E).
NF4 = (-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0)
NF4 += (0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0)


def nf4(weight: Tensor) -> Tensor:
    """Rounded to NF4 in groups of 64 with float32 scales."""
    groups = weight.unflatten(1, (-1, 64))
    scales = groups.abs().amax(dim=2, keepdim=True)
    scales = torch.where(scales == 0, 1, scales)
    levels = torch.tensor(NF4, device=weight.device)
    edges = (levels[1:] + levels[:-1]) / 2
    return (levels[torch.bucketize(groups / scales, edges)] * scales).flatten(1)


def rounded_weight(name: str, weight: Tensor, activations: Activations) -> Tensor:
    """(N, K) float32 -> what the input is multiplied with."""
    if name == "nf4-weight-only":
        return nf4(weight)
    if name == "int8-w8a8":
        return INT8.dequantize(*INT8.quantize(weight))
    return widened(INT4.dequantize(*INT4.quantize(weight)), activations)


def rounded_input(name: str, x: Tensor, activations: Activations, unsigned: bool) -> Tensor:
    """(M, K) -> (M, K) float32."""
    if name == "nf4-weight-only":
        return x.float()
    if name == "int8-w8a8":
        return INT8.dequantize(*INT8.quantize(x))
    return quantized_input(x, torch.ones(x.shape[1], dtype=x.dtype, device=x.device), activations, unsigned)


class RoundedLinear(nn.Module):
    """A linear of a bracket; `spans` are (first, last + 1, unsigned) of input channels, quantized each for itself."""

    def __init__(
        self, name: str, linear: nn.Linear, spans: list[tuple[int, int, bool]], activations: Activations
    ) -> None:
        super().__init__()
        self.name, self.spans, self.activations = name, spans, activations
        parts = [rounded_weight(name, linear.weight[:, a:b].float(), activations) for a, b, _ in spans]
        self.weight, self.bias = nn.Parameter(torch.cat(parts, dim=1), False), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        parts = [rounded_input(self.name, rows[:, a:b], self.activations, unsigned) for a, b, unsigned in self.spans]
        y = torch.cat(parts, dim=1) @ self.weight.T + self.bias.float()
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


@torch.no_grad()
def apply_bracket(name: str, transformer: Any, activations: Activations) -> Any:
    """Replace, in place, the linears that a 4-bit checkpoint quantizes; returns the Diffusers transformer."""
    by_source: dict[str, list[LinearPlan]] = {}
    for linear in flux_plan(flux_dims(dict(transformer.config))).linears():
        for source in linear.sources:
            by_source.setdefault(source, []).append(linear)
    for source, linears in by_source.items():
        dense = transformer.get_submodule(source)
        if linears[0].kind == "w4a16" and name == "rtn":
            rounded = quantize_modulation(dense.weight, dense.bias).dense(dense.weight.dtype)[0]
            dense.weight = nn.Parameter(rounded, False)
            continue
        spans = [(*(linear.columns or (0, linear.in_features)), linear.unsigned) for linear in linears]
        transformer.set_submodule(source, RoundedLinear(name, dense, spans, activations))
    return transformer
