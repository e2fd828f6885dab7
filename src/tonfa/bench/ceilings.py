"""What this GPU reaches at best, measured in the run whose results are compared with it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tonfa.bench.protocol import interleaved
from tonfa.bench.work import Work

COPY_BYTES = 2**30
RUNS = 10


@dataclass(frozen=True)
class Ceilings:
    """Bytes and FLOPs a second; None where the GPU cannot do it, or nothing asked for it."""

    bandwidth: float
    bf16: float
    fp8: float | None
    int8: float | None
    attention: float
    attention_fp8: float | None = None

    def product(self, activations: str) -> tuple[float, str]:
        """The rate of products with these activations, and what was measured."""
        if activations == "fp8" and self.fp8:
            return self.fp8, "FP8 row-wise"
        if activations in ("int8", "int4") and self.int8:
            return self.int8, "INT8"
        return self.bf16, "BF16"

    def attending(self, attention: str) -> tuple[float, str]:
        """The rate of this choice of attention, and what was measured."""
        if attention == "fp8" and self.attention_fp8:
            return self.attention_fp8, "cuDNN, FP8"
        return self.attention, "cuDNN, BF16"


def has_fp8(device: torch.device) -> bool:
    """Whether the GPU multiplies FP8 natively, with a scale for each row."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def scaled_mm(x: Tensor, weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """FP8 codes (M, K) and (N, K) with scales (M, 1) and (1, N) -> (M, N) bf16, by cuBLAS."""
    return torch._scaled_mm(x, weight.t(), rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """cuDNN's, which torch takes only when it is asked for."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return functional.scaled_dot_product_attention(q, k, v)


def measure(
    work: Work,
    heads: int,
    head_dim: int,
    batch: int,
    device: torch.device,
    activations: Collection[str] = ("int8", "fp8"),
    attentions: Collection[str] = (),
) -> Ceilings:
    """The best rate over the shapes of this step, in bf16 and in what these activations and attentions need."""
    kinds = {"int8" if name == "int4" else name for name in activations}

    def rate(amount: float, function: Callable[[], Any]) -> float:
        timing = interleaved({"": [function]}, RUNS, device, queued=True)[""]
        return amount / (timing.median * 1e-3)

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    bandwidth = rate(2 * COPY_BYTES, partial(target.copy_, source))
    del source, target
    products = [_rates(rate, work.rows, n, k, device, kinds) for n, k in work.shapes]
    q, k, v = (
        torch.randn(batch, heads, work.rows // batch, head_dim, device=device, dtype=torch.bfloat16) for _ in range(3)
    )
    length = work.rows // batch
    flops = 4 * batch * heads * length**2 * head_dim
    attention = rate(flops, partial(_attention, q, k, v))
    rounded = _fp8_attention(q, k, v) if "fp8" in attentions else None
    return Ceilings(
        bandwidth,
        _best([p["bf16"] for p in products]) or 0.0,
        _best([p["fp8"] for p in products]),
        _best([p["int8"] for p in products]),
        attention,
        None if rounded is None else rate(flops, rounded),
    )


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    try:
        return cudnn_attention(q, k, v)
    except RuntimeError:  # this GPU or this torch has none
        return functional.scaled_dot_product_attention(q, k, v)


def _fp8_attention(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
    """Of operands that are rounded already. The device and the shape are those of a step that has run."""
    from tonfa.kernels.attention import cudnn_fp8
    from tonfa.kernels.attention.fp8_quantize import quantize

    norm = [torch.ones(q.shape[3], dtype=q.dtype, device=q.device)]
    return partial(cudnn_fp8.attend, quantize(q, k, v, norm, norm))


def _best(rates: Sequence[float | None]) -> float | None:
    return max((r for r in rates if r is not None), default=None)


def _rates(
    rate: Callable[[float, Callable[[], Any]], float],
    m: int,
    n: int,
    k: int,
    device: torch.device,
    kinds: Collection[str],
) -> dict[str, float | None]:
    flops = 2.0 * m * n * k
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    weight = torch.randn(n, k, device=device, dtype=torch.bfloat16)
    found: dict[str, float | None] = {"bf16": rate(flops, partial(functional.linear, x, weight))}
    found |= {"fp8": None, "int8": None}
    if "fp8" in kinds and has_fp8(device):
        rows, columns = torch.ones(m, 1, device=device), torch.ones(1, n, device=device)
        codes = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        found["fp8"] = rate(flops, partial(scaled_mm, *codes, rows, columns))
    if "int8" in kinds:
        a, b = (t.mul(40).clamp_(-127, 127).to(torch.int8) for t in (x, weight))
        found["int8"] = rate(flops, partial(torch._int_mm, a, b.t()))
    return found
