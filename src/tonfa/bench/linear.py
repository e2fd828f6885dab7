"""One quantized linear, quantization of its input included, beside 16-bit and 8-bit ones of the same shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.bench import prediction
from tonfa.bench.ceilings import has_fp8, scaled_mm
from tonfa.bench.comfy import comfy_linear
from tonfa.bench.protocol import Say, Timing, interleaved, record
from tonfa.bench.synthetic import outlier_input, random_linear
from tonfa.dispatch import default_activations
from tonfa.errors import TonfaError, UnsupportedError
from tonfa.formats import FP8
from tonfa.layers.linear import SVDQLinear

INPUTS = 4
"""Different inputs that the runs take in turn."""

CHECK_ROWS = 64
CHECK_BOUNDS = {"none": 0.005, "int8": 0.04, "fp8": 0.04, "int4": 0.2}
"""Relative L2 error against float64 with exact activations: about twice that of the references."""

TORCH_BF16, TORCH_FP32, CUBLAS, SCALED_MM, COMFY = (
    "torch-bf16",
    "torch-fp32",
    "cublas-bf16",
    "scaled-mm-fp8",
    "comfy-kitchen",
)
BASELINES = (TORCH_BF16, TORCH_FP32, CUBLAS, SCALED_MM, COMFY)

Candidates = dict[str, list[Callable[[], Any]]]


@dataclass(frozen=True)
class LinearRequest:
    """Everything that `tonfa bench linear` was asked for."""

    n: int
    k: int
    rows: int
    rank: int
    activations: str | None
    baselines: Sequence[str] | None
    """None takes all that run on the device."""
    runs: int
    seed: int
    device: torch.device


def default_baselines(device: torch.device) -> tuple[str, ...]:
    """What people would use instead on this device."""
    return (CUBLAS, SCALED_MM, COMFY) if device.type == "cuda" else (TORCH_BF16, TORCH_FP32)


def bench_linear(request: LinearRequest, say: Say) -> list[dict[str, Any]]:
    """One record for our linear and one for each baseline.

    Raises TonfaError where our linear computes wrong numbers, UnsupportedError where a baseline that was asked for
    cannot run.
    """
    device = request.device
    policy = request.activations or default_activations(device)
    generator = torch.Generator(device).manual_seed(request.seed)
    with torch.inference_mode():
        layer = random_linear(request.n, request.k, request.rank, device, generator, policy)
        inputs = [outlier_input(request.rows, request.k, generator, device) for _ in range(INPUTS)]
        weight, bias = layer.weights().dense()
        error = check(layer, inputs[0][:CHECK_ROWS], weight, bias, policy)
        say(f"checked {request.n} x {request.k}: {error:.2%} from float64")
        candidates: Candidates = {"tonfa": [partial(layer, x) for x in inputs]}
        names = request.baselines or default_baselines(device)
        for name in names:
            try:
                candidates[name] = baseline(name, layer, weight, bias, inputs)
            except UnsupportedError as reason:
                if request.baselines:
                    raise
                say(f"skipped baseline {name}: {reason}")
        say(f"{request.rows} rows: {request.runs} runs of {', '.join(candidates)} in turn")
        timings = interleaved(candidates, request.runs, device, queued=True)
    return _records(request, layer, policy, timings)


def check(layer: SVDQLinear, x: Tensor, weight: Tensor, bias: Tensor, policy: str) -> float:
    """The error of the layer against float64. Raises TonfaError if it is over the bound of its activations."""
    exact = x.double() @ weight.double().T + bias.double()
    error = float((layer(x).double() - exact).norm() / exact.norm())
    if not error <= CHECK_BOUNDS[policy]:
        raise TonfaError(
            f"the linear is off by {error:.1%} from float64, {CHECK_BOUNDS[policy]:.0%} at most is allowed with "
            f"{policy} activations; no speed is recorded"
        )
    return error


def baseline(
    name: str, layer: SVDQLinear, weight: Tensor, bias: Tensor, inputs: Sequence[Tensor]
) -> list[Callable[[], Any]]:
    """The baseline of this name on each input. Raises UnsupportedError where it cannot run."""
    if name == COMFY:
        linear = comfy_linear(layer.weights())
        _check_published(linear, inputs[0][:CHECK_ROWS], weight, bias)
        return [partial(linear, x) for x in inputs]
    if name == SCALED_MM:
        if not has_fp8(weight.device):
            raise UnsupportedError(f"{weight.device} multiplies no FP8")
        codes, scales = FP8.quantize(weight)
        return [partial(_product_alone, *FP8.quantize(x), codes, scales) for x in inputs]
    if name == CUBLAS and weight.device.type != "cuda":
        raise UnsupportedError(f"{CUBLAS} needs a GPU; on a CPU it is {TORCH_BF16}")
    dtype = torch.float32 if name == TORCH_FP32 else torch.bfloat16
    dense = weight.to(dtype), bias.to(dtype)
    return [partial(functional.linear, x.to(dtype), *dense) for x in inputs]


def _check_published(linear: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Raise UnsupportedError unless a linear of others runs, and is as far from float64 as W4A4 arithmetic is."""
    try:
        found = linear(x).double()
    except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
        raise UnsupportedError(f"it fails with {type(error).__name__}: {' '.join(str(error).split())}") from error
    exact = x.double() @ weight.double().T + bias.double()
    off = float((found - exact).norm() / exact.norm())
    if not off <= CHECK_BOUNDS["int4"]:
        raise UnsupportedError(f"it is off by {off:.1%} from float64, {CHECK_BOUNDS['int4']:.0%} at most is allowed")


def _product_alone(x: Tensor, x_scales: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """No bias, and the input quantized beforehand: a bound for what FP8 can reach rather than a linear."""
    return scaled_mm(x, codes, x_scales, scales.t())


def _records(
    request: LinearRequest, layer: SVDQLinear, policy: str, timings: Mapping[str, Timing]
) -> list[dict[str, Any]]:
    packed = sum(t.numel() * t.itemsize for t in layer.state_dict().values()) / 2**30
    case = {"m": request.rows, "n": request.n, "k": request.k, "rank": request.rank, "seed": request.seed}
    ours = {"weights": "int4", "activations": policy, "backend": layer.binding().kernels.backend}
    gpu = prediction.known_gpu(request.device) if ours["backend"] == "cuda" else None
    predicted = None
    if gpu is not None:
        value = prediction.linear_ms(gpu, request.rows, request.n, request.k, request.rank)
        predicted = prediction.described(gpu, {"quantize and product": value})
    return [
        record(
            bench="linear",
            case=case,
            variant=f"SVDQLinear int4 weights, {policy} activations" if name == "tonfa" else name,
            settings=ours if name == "tonfa" else {},
            timing=timing,
            device=request.device,
            baselines={n: t for n, t in timings.items() if n != "tonfa"},
            prediction=predicted if name == "tonfa" else None,
            memory_gib={"weights": packed if name == "tonfa" else request.n * request.k * _BYTES[name] / 2**30},
        )
        for name, timing in timings.items()
    ]


_BYTES = {TORCH_BF16: 2, TORCH_FP32: 4, CUBLAS: 2, SCALED_MM: 1, COMFY: 0.5 + 2 / 64}
"""Of a weight."""
