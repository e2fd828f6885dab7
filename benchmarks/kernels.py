"""Every kernel of the Triton backend at FLUX.1's shapes, Hopper's quantizers and products, against torch and copies.

    python benchmarks/kernels.py                       all of them
    python benchmarks/kernels.py --only expand product --dry-run
    python benchmarks/kernels.py --only hopper-product         in clusters of two blocks, and alone
    python benchmarks/kernels.py --tune 4608,3072,12288 ...    every tile for a product (M,N,K); prints, records nothing

Calls are captured in a CUDA graph, ten at a time on inputs that rotate, so that the host's time is not in the figures.
Appends one record a case to results/<device>.jsonl. Before a kernel is timed, its result is checked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.bench.protocol import Timing, append, interleaved, record, results_file
from tonfa.formats import GROUP_SIZE
from tonfa.kernels.attention import sdpa
from tonfa.kernels.hopper import inputs as hopper_inputs
from tonfa.kernels.hopper import layout as hopper_layout
from tonfa.kernels.hopper import packed_product as hopper_packed
from tonfa.kernels.hopper import product as hopper_product
from tonfa.kernels.hopper import quantize as hopper_quantize
from tonfa.kernels.hopper import tiles as hopper_tiles
from tonfa.kernels.hopper.product_norm_rope import product_norm_rope as hopper_norm_rope
from tonfa.kernels.triton import product as triton_product
from tonfa.kernels.triton import tiles
from tonfa.kernels.triton.expand import expand
from tonfa.kernels.triton.product import PackedProduct, pack_product, product, run
from tonfa.kernels.triton.product_gate_residual import product_gate_residual
from tonfa.kernels.triton.product_norm_rope import product_norm_rope
from tonfa.kernels.triton.quantize import norm_modulate_quantize, pack_input, quantize
from tonfa.kernels.triton.w4a16 import pack_w4a16, pack_w4a16_group, w4a16, w4a16_group
from tonfa.ops import attention as attention_op
from tonfa.ops import product as product_op
from tonfa.ops import w4a16 as w4a16_op
from tonfa.ops.activation import Activations, InputWeights, QuantizedActivation
from tonfa.weights import SVDQWeights, W4A16Weights

CUDA = torch.device("cuda")
CALLS = 10
RANK = 32
HIDDEN = 3072
PRODUCTS = [
    (m, n, k)
    for m in (4608, 4096, 512)
    for n, k in ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN))
]
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """A kernel at one shape, beside what it is compared with; each has functions that are called in turn."""

    op: str
    shape: dict[str, int]
    calls: list[Call]
    baselines: dict[str, list[Call]] = field(default_factory=dict)
    flop: float = 0.0
    nbytes: float = 0.0
    error: float = 0.0
    backend: str = "triton"


def captured(calls: list[Call]) -> Call:
    """A graph of `CALLS` calls, the functions in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    return graph.replay


def per_call(timing: Timing) -> Timing:
    """Of one call of a graph."""
    return replace(timing, median=timing.median / CALLS, least=timing.least / CALLS, most=timing.most / CALLS)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device=CUDA, dtype=torch.float32).to(dtype)


def random_layer(n: int, k: int, unsigned: bool = False) -> SVDQWeights:
    """A layer of the proportions that quantizing a Gaussian weight gives."""
    qweight = torch.randint(0, 256, (n, k // 2), device=CUDA, dtype=torch.uint8)
    wscales = ((torch.rand(k // GROUP_SIZE, n, device=CUDA) + 0.5) * 0.1 / k**0.5).bfloat16()
    smooth = (torch.rand(k, device=CUDA) + 0.5).bfloat16()
    down, up = random(k, RANK) / k**0.5, random(n, RANK) / RANK**0.5
    return SVDQWeights(qweight, wscales, smooth, down, up, random(n), unsigned)


def outlier_input(rows: int, channels: int) -> Tensor:
    """Gaussian with a few channels thirty times as large, as diffusion transformers have them."""
    x = torch.randn(rows, channels, device=CUDA)
    x[:, torch.randperm(channels, device=CUDA)[: channels // 64]] *= 30
    return x.bfloat16()


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def copies(nbytes: float) -> dict[str, list[Call]]:
    """Torch's copy that reads and writes `nbytes` together."""
    pairs = [tuple(torch.empty(int(nbytes) // 2, dtype=torch.uint8, device=CUDA) for _ in range(2)) for _ in range(2)]
    return {"copy": [partial(b.copy_, a) for a, b in pairs]}


def matrices(w: SVDQWeights, x: QuantizedActivation, packed: PackedProduct) -> dict[str, list[Call]]:
    """torch's products of the same size: FP8 by rows with fast accumulation, and bf16."""
    a, b = x.codes, packed.widened
    assert x.scales is not None and b is not None
    columns = packed.row_scales.unsqueeze(0)
    dense_x, dense_w = random(*a.shape), random(*b.shape)
    bias = random(b.shape[0])
    calls: dict[str, list[Call]] = {"torch-bf16": [lambda: functional.linear(dense_x, dense_w, bias)]}
    if a.dtype == torch.float8_e4m3fn:
        calls["torch-scaled-mm"] = [
            lambda: torch._scaled_mm(
                a, b.t(), scale_a=x.scales, scale_b=columns, out_dtype=torch.bfloat16, use_fast_accum=True
            )
        ]
    else:
        calls["torch-int-mm"] = [lambda: torch._int_mm(a, b.t())]
    return calls


def expand_cases(policy: Activations) -> Iterator[Case]:
    for n, k in ((3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (4 * HIDDEN, HIDDEN), (HIDDEN, 4 * HIDDEN)):
        layers = [random_layer(n, k) for _ in range(3)]
        packed = [pack_product(w, activations=policy) for w in layers]
        out = torch.empty((n, k), dtype=packed[0].code_dtype, device=CUDA)
        calls = [partial(expand, p.qweight, p.wscales, p.inverse_scales, out) for p in packed]
        calls[0]()
        error = off(out.float(), product_op.widen(layers[0], policy)[0].float())
        nbytes = n * k * (1.5 + 2 / GROUP_SIZE)
        yield Case("expand", {"n": n, "k": k}, calls, copies(nbytes), nbytes=nbytes, error=error)


def inputs_of(w: SVDQWeights, policy: Activations, rows: int) -> list[QuantizedActivation]:
    packed = pack_input(InputWeights(w.smooth_factor, w.proj_down, w.unsigned, policy))
    return [quantize(outlier_input(rows, w.in_features), packed) for _ in range(2)]


def product_cases(policy: Activations) -> Iterator[Case]:
    """With weights that stay in 8 bits; the epilogues at the layers that have them; once with expansion."""
    for m, n, k in PRODUCTS:
        w = random_layer(n, k)
        packed, inputs = pack_product(w, policy, activations=policy), inputs_of(w, policy, m)
        baselines = matrices(w, inputs[0], packed)
        shape, flop = {"m": m, "n": n, "k": k, "rank": RANK}, 2.0 * m * n * (k + RANK)
        exact = product_op.reference(inputs[0], w, policy)
        error = off(product(inputs[0], packed), exact)
        yield Case("product", shape, [partial(product, x, packed) for x in inputs], baselines, flop, error=error)
        expanding = pack_product(w, activations=policy)
        calls = [partial(product, x, expanding) for x in inputs]
        yield Case("product-int4", shape, calls, baselines, flop, error=off(calls[0](), exact))
        if m == 4096:
            continue
        if n == 3 * HIDDEN:
            yield heads_case(inputs, packed, shape, baselines, flop)
        elif n == 4 * HIDDEN:
            out = torch.empty((m, n), dtype=torch.bfloat16, device=CUDA)
            calls = [partial(run, x, packed, "gelu", out) for x in inputs]
            calls[0]()
            error = off(out, functional.gelu(exact.float(), approximate="tanh"))
            yield Case("product-gelu", shape, calls, baselines, flop, error=error)
        else:
            residual, gate = random(1, m, n), random(1, n)
            calls = [partial(product_gate_residual, x, packed, residual, gate) for x in inputs]
            error = off(calls[0](), residual.float() + gate.float().unsqueeze(1) * exact.float())
            yield Case("product-gate-residual", shape, calls, baselines, flop, error=error)


def heads_case(
    inputs: list[QuantizedActivation],
    packed: PackedProduct,
    shape: dict[str, int],
    baselines: dict[str, list[Call]],
    flop: float,
) -> Case:
    angles = torch.rand(shape["m"], 64, device=CUDA).repeat_interleave(2, dim=1)
    norms, rotary = (random(128), random(128)), (angles.cos(), angles.sin())
    calls = [partial(product_norm_rope, x, packed, *norms, rotary) for x in inputs]
    v = product(inputs[0], packed)[:, 2 * HIDDEN :].view(1, -1, HIDDEN // 128, 128).transpose(1, 2)
    return Case("product-norm-rope", shape, calls, baselines, flop, error=off(calls[0]()[2], v))


def quantize_cases(policy: Activations) -> Iterator[Case]:
    for m, k, rank, norm in (
        (4608, HIDDEN, RANK, False),
        (4608, 4 * HIDDEN, RANK, False),
        (4608, HIDDEN, RANK, True),
        (4608, HIDDEN, 2 * RANK, True),
        (512, HIDDEN, RANK, True),
    ):
        w = random_input(k, rank, policy)
        packed = pack_input(w)
        quantizer = norm_modulate_quantize if norm else quantize
        yield quantize_case(partial(quantizer, w=packed), lambda q: q.codes.float() * q.scales, w, m, norm, "triton")


def hopper_quantize_cases() -> Iterator[Case]:
    """At 4608 rows (single blocks), 4096 (image) and 512 (text)."""
    for norm in (True, False):
        for m, rank in ((4608, RANK), (4608, 2 * RANK), (4096, RANK), (512, RANK)):
            w = random_input(HIDDEN, rank, "fp8")
            packed = hopper_inputs.pack_input(w)
            quantizer = hopper_quantize.norm_modulate_quantize if norm else hopper_quantize.quantize
            yield quantize_case(partial(quantizer, w=packed), hopper_values, w, m, norm, "hopper")


def hopper_values(x: Any) -> Tensor:
    return hopper_layout.unpack_codes(x.codes, x.rows, x.channels).float() * x.scales[:, None]


def in_clusters_of(blocks: int, call: Call) -> Call:
    def run() -> Any:
        with mock.patch.object(hopper_tiles, "CLUSTER", blocks):
            return call()

    return run


def hopper_product_cases() -> Iterator[Case]:
    """Each layer's own epilogue, weights expanded before; beside it the same by blocks that load alone."""
    for m, n, k in PRODUCTS:
        w = random_layer(n, k)
        packed = hopper_packed.pack_product_expanded(w)
        quantizer = hopper_inputs.pack_input(InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "fp8"))
        inputs: list[Any] = [hopper_quantize.quantize(outlier_input(m, k), quantizer) for _ in range(2)]
        x = inputs[0]
        lowrank = hopper_layout.unpack_lowrank(x.lowrank, m, RANK).float() * x.scales[:, None]
        codes = hopper_layout.unpack_codes(x.codes, m, k)
        exact = product_op.reference(QuantizedActivation(codes, x.scales[:, None], lowrank, x.dtype), w, "fp8")
        error = off(hopper_product.product(x, packed), exact)
        op, calls = hopper_epilogue(inputs, packed, m, n)
        clusters = [in_clusters_of(2, call) for call in calls]
        alone = {"alone": [in_clusters_of(1, call) for call in calls]}
        shape, flop = {"m": m, "n": n, "k": k, "rank": RANK}, 2.0 * m * n * (k + RANK)
        yield Case(f"hopper-{op}", shape, clusters, alone, flop, error=error, backend="hopper")


def hopper_epilogue(inputs: list[Any], packed: hopper_packed.PackedProduct, m: int, n: int) -> tuple[str, list[Call]]:
    """The product that FLUX has at a layer of `n` channels."""
    if n == 3 * HIDDEN:
        angles = torch.rand(m, 64, device=CUDA).repeat_interleave(2, dim=1)
        norms, rotary = (random(128), random(128)), (angles.cos(), angles.sin())
        return "product-norm-rope", [partial(hopper_norm_rope, x, packed, *norms, rotary) for x in inputs]
    if n == 4 * HIDDEN:
        following = hopper_inputs.pack_input(random_input(n, RANK, "fp8"))
        call = partial(hopper_product.product_gelu_quantize, w=packed, following=following)
        return "product-gelu-quantize", [partial(call, x) for x in inputs]
    residual, gate = random(1, m, n), random(1, n)
    call = partial(hopper_product.product_gate_residual, w=packed, residual=residual, gate=gate)
    return "product-gate-residual", [partial(call, x) for x in inputs]


def random_input(k: int, rank: int, policy: Activations) -> InputWeights:
    smooth = (torch.rand(k, device=CUDA) + 0.5).bfloat16()
    return InputWeights(smooth, random(k, rank) / k**0.5, False, policy)


def quantize_case(
    quantizer: Callable[..., Any], values: Callable[[Any], Tensor], w: InputWeights, m: int, norm: bool, backend: str
) -> Case:
    """`quantizer` of three inputs in turn; `values` are what its codes stand for."""
    k, rank = w.proj_down.shape
    inputs = [outlier_input(m, k).unsqueeze(0) for _ in range(3)]
    scale, shift = random(1, k), random(1, k)
    x = inputs[0].float()
    if norm:
        calls = [partial(quantizer, x, scale, shift) for x in inputs]
        x = functional.layer_norm(x, (k,), eps=1e-6) * scale.float() + shift.float()
    else:
        calls = [partial(quantizer, x) for x in inputs]
    error = off(values(calls[0]()), (x / w.smooth_factor.float())[0])
    nbytes = m * k * 3.0
    op = ("" if backend == "triton" else f"{backend}-") + ("norm-quantize" if norm else "quantize")
    shape = {"m": m, "k": k, "rank": rank}
    return Case(op, shape, calls, copies(nbytes), nbytes=nbytes, error=error, backend=backend)


def modulation(n: int) -> W4A16Weights:
    qweight = torch.randint(0, 256, (n, HIDDEN // 2), device=CUDA, dtype=torch.uint8)
    wscales = (torch.rand(HIDDEN // GROUP_SIZE, n, device=CUDA) * 0.01 + 0.01).bfloat16()
    return W4A16Weights(qweight, wscales, -7.5 * wscales, random(n))


def w4a16_cases() -> Iterator[Case]:
    for batch, n in ((1, 6 * HIDDEN), (4, 6 * HIDDEN), (1, 3 * HIDDEN)):
        weights = [modulation(n) for _ in range(4)]
        x = random(batch, HIDDEN)
        packed = [pack_w4a16(w) for w in weights]
        nbytes = n * HIDDEN * (0.5 + 4 / GROUP_SIZE)
        error = off(w4a16(x, packed[0]), w4a16_op.reference(x, weights[0]))
        calls = [partial(w4a16, x, p) for p in packed]
        yield Case("w4a16", {"b": batch, "n": n}, calls, copies(nbytes), nbytes=nbytes, error=error)
    weights = [modulation(6 * HIDDEN) for _ in range(10)]
    x, group = random(1, HIDDEN), pack_w4a16_group(weights)
    nbytes = 60 * HIDDEN * HIDDEN * (0.5 + 4 / GROUP_SIZE)
    error = off(w4a16_group(x, group)[9], w4a16_op.reference(x, weights[9]))
    shape = {"b": 1, "n": 6 * HIDDEN, "linears": 10}
    yield Case("w4a16-group", shape, [partial(w4a16_group, x, group)], copies(nbytes), nbytes=nbytes, error=error)


def attention_cases() -> Iterator[Case]:
    for order in ("heads-first", "tokens-first"):
        q, k, v = random(3, 1, 24, 4608, 128) if order == "heads-first" else random(3, 1, 4608, 24, 128).transpose(2, 3)
        plain = partial(attention_op.reference, q, k, v)
        call = partial(sdpa.attention, q, k, v)
        error, flop = off(call(), plain()), 4.0 * 24 * 4608 * 4608 * 128
        yield Case(
            f"attention {order}", {"l": 4608, "h": 24, "d": 128}, [call], {"torch-sdpa": [plain]}, flop, error=error
        )


def measure(case: Case, policy: Activations, runs: int) -> dict[str, Any]:
    """Time one case, print it and return its record."""
    if not case.error < 0.06:
        raise SystemExit(f"{case.op} {case.shape} is off by {case.error:.1%}; no speed is recorded")
    candidates = {"tonfa": case.calls, **case.baselines}
    timings = interleaved({name: [captured(calls)] for name, calls in candidates.items()}, runs, CUDA)
    timings = {name: per_call(timing) for name, timing in timings.items()}
    own = timings.pop("tonfa")
    rate = (
        f"{case.flop / own.median / 1e9:6.0f} TFLOP/s" if case.flop else f"{case.nbytes / own.median / 1e9:6.2f} TB/s  "
    )
    shape = " ".join(f"{name}={value}" for name, value in case.shape.items())
    others = "  ".join(f"{name} {t.median * 1e3:.1f} us ({t.median / own.median:.2f}x)" for name, t in timings.items())
    print(f"{case.op:22s} {shape:30s} {own.median * 1e3:8.1f} us  {rate}  {others}  error {case.error:.1e}", flush=True)
    settings = {"weights": "int4", "activations": policy, "backend": case.backend}
    return record("kernels", {"op": case.op, **case.shape}, case.op, settings, own, CUDA, timings)


def tune(shape: tuple[int, int, int], policy: Activations, runs: int) -> None:
    """Print the time of every tile, best last."""
    m, n, k = shape
    w = random_layer(n, k)
    packed, inputs = pack_product(w, policy, activations=policy), inputs_of(w, policy, m)
    out = torch.empty((m, n), dtype=torch.bfloat16, device=CUDA)
    found = []
    for block_m, block_n, warps, stages in (
        (128, 256, 8, 3),
        (128, 128, 8, 4),
        (128, 128, 8, 5),
        (128, 128, 4, 3),
        (64, 256, 4, 4),
        (64, 128, 4, 4),
        (64, 128, 4, 6),
        (64, 64, 4, 6),
    ):
        for group_m in (4, 8, 16):
            tile = tiles.Tile(block_m, block_n, 128, warps, stages, group_m)
            calls = [lambda x=x, tile=tile: run(x, packed, "plain", out, tile=tile) for x in inputs]
            timing = per_call(interleaved({"tile": [captured(calls)]}, runs, CUDA)["tile"])
            found.append((timing.median, tile))
    for median, tile in sorted(found, key=lambda f: -f[0]):
        print(f"{m},{n},{k}: {median * 1e3:8.1f} us {2.0 * m * n * k / median / 1e9:6.0f} TFLOP/s  {tile}", flush=True)


def main() -> None:
    groups: dict[str, Callable[[Activations], Iterator[Case]]] = {
        "expand": expand_cases,
        "product": product_cases,
        "quantize": quantize_cases,
        "hopper-quantize": lambda policy: hopper_quantize_cases(),
        "hopper-product": lambda policy: hopper_product_cases(),
        "w4a16": lambda policy: w4a16_cases(),
        "attention": lambda policy: attention_cases(),
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--activations", choices=list(triton_product.CODE_DTYPES), default="fp8")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tune", nargs="+", metavar="M,N,K", help="time every tile instead")
    parser.add_argument("--results", type=Path, help="file to append to (default: results/<device>.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        if arguments.tune:
            for text in arguments.tune:
                m, n, k = map(int, text.split(","))
                tune((m, n, k), arguments.activations, arguments.runs)
            return
        for name in arguments.only:
            for case in groups[name](arguments.activations):
                line = measure(case, arguments.activations, arguments.runs)
                if not arguments.dry_run:
                    append(arguments.results or results_file(CUDA), line)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
