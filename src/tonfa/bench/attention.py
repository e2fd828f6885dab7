"""Attention: what our kernels are bound to, beside the backends of torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tonfa.bench.protocol import Say, interleaved, record
from tonfa.bench.synthetic import outlier_channels
from tonfa.dispatch import bind, default_activations
from tonfa.errors import TonfaError, UnsupportedError
from tonfa.ops import attention

INPUTS = 3
CHECK_BOUND = 0.02
"""Relative L2 error against float32, bf16 in and out; torch's own bf16 backends are at 0.005."""
CHECK_TOKENS = 256

DEFAULT = "sdpa-default"
_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
BASELINES = (DEFAULT, *_BACKENDS)

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class AttentionRequest:
    """Everything that `tonfa bench attention` was asked for."""

    batch: int
    heads: int
    tokens: int
    head_dim: int
    activations: str | None
    baselines: Sequence[str] | None
    """None takes all of default, flash and cuDNN that run on the device."""
    runs: int
    seed: int
    device: torch.device


def bench_attention(request: AttentionRequest, say: Say) -> list[dict[str, Any]]:
    """One record for our attention and one for each backend of torch.

    Raises TonfaError where ours computes wrong numbers, UnsupportedError where a backend that was asked for cannot run.
    """
    device = request.device
    kernels = bind(device, request.activations or default_activations(device))
    generator = torch.Generator(device).manual_seed(request.seed)
    with torch.inference_mode():
        inputs = [_inputs(request, generator) for _ in range(INPUTS)]
        error = check(kernels.attention, [t[:, :, :CHECK_TOKENS] for t in inputs[0]])
        say(f"checked attention of the {kernels.backend} backend: {error:.2%} from float32")
        functions: dict[str, Attention] = {"tonfa": kernels.attention}
        for name in request.baselines or (DEFAULT, "sdpa-flash", "sdpa-cudnn"):
            function = partial(_sdpa, name)
            try:
                function(*inputs[0])
            except RuntimeError as reason:
                message = f"{name} does not run on {device} with this shape: {str(reason).splitlines()[0]}"
                if request.baselines:
                    raise UnsupportedError(message) from reason
                say(f"skipped {message}")
                continue
            functions[name] = function
        candidates = {name: [partial(f, *qkv) for qkv in inputs] for name, f in functions.items()}
        say(f"{request.tokens} tokens: {request.runs} runs of {', '.join(candidates)} in turn")
        timings = interleaved(candidates, request.runs, device, queued=True)
    flops = 4 * request.batch * request.heads * request.tokens**2 * request.head_dim
    return [
        record(
            bench="attention",
            case={
                "batch": request.batch,
                "heads": request.heads,
                "tokens": request.tokens,
                "head_dim": request.head_dim,
                "tflop": round(flops / 1e12, 6),
                "seed": request.seed,
            },
            variant="tonfa attention" if name == "tonfa" else name,
            settings={"backend": kernels.backend} if name == "tonfa" else {},
            timing=timing,
            device=device,
            baselines={n: t for n, t in timings.items() if n != "tonfa"},
        )
        for name, timing in timings.items()
    ]


def check(function: Attention, qkv: Sequence[Tensor]) -> float:
    """The error against float32. Raises TonfaError if it is over CHECK_BOUND."""
    q, k, v = qkv
    exact = attention.reference(q.float(), k.float(), v.float())
    error = float((function(q, k, v).float() - exact).norm() / exact.norm())
    if not error <= CHECK_BOUND:
        raise TonfaError(
            f"the attention is off by {error:.1%} from float32, {CHECK_BOUND:.0%} at most is allowed; "
            "no speed is recorded"
        )
    return error


def _inputs(request: AttentionRequest, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (B, H, L, D) bf16; keys share a mean and have outlier channels, as a trained model's do."""
    shape = request.batch, request.heads, request.tokens, request.head_dim
    q, k, v = (torch.randn(shape, generator=generator, device=request.device) for _ in range(3))
    k += torch.randn(1, request.heads, 1, request.head_dim, generator=generator, device=request.device)
    k[..., outlier_channels(request.head_dim)] *= 4
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def _sdpa(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if name == DEFAULT:
        return functional.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(_BACKENDS[name]):
        return functional.scaled_dot_product_attention(q, k, v)
