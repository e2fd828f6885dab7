"""16-bit weights behind the interface of the quantized ones: torch's own linear, nothing quantized.

With it the fused model computes what Diffusers' does (so the fusion is tested), and a plan may keep layers dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from tonfa.kernels.attention import sdpa
from tonfa.ops.activation import QuantizedActivation

DenseWeights = tuple[Tensor, Tensor | None]
"""Weight (N, K) and bias (N,)."""


def _quantize(x: Tensor, w: None) -> QuantizedActivation:
    return QuantizedActivation(x.reshape(-1, x.shape[-1]), None, None, x.dtype)


def _product(x: QuantizedActivation, w: DenseWeights) -> Tensor:
    return functional.linear(x.codes, *w)


def _w4a16(x: Tensor, w: DenseWeights) -> Tensor:
    return functional.linear(x, *w)


def _pack(w: Any) -> Any:
    return w


TABLE: Mapping[str, Callable[..., Any]] = {
    "pack_input": _pack,
    "pack_product": _pack,
    "pack_w4a16": _pack,
    "quantize": _quantize,
    "product": _product,
    "w4a16": _w4a16,
    "attention": sdpa.attention,
}
