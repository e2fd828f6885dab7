"""One SVDQLinear against torch's own linear in bf16 and fp32, quantization and low-rank branch included.

    python benchmarks/linear.py                        the cases of the issue: 3072 x 3072, 512 and 4608 rows
    python benchmarks/linear.py --rows 512 --runs 200 --dry-run

Appends one record a case to results/<device>.jsonl. Before anything is timed, the layer is checked against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from protocol import append, interleaved, record, results_file
from tonfa.dispatch import default_activations
from tonfa.layers.linear import SVDQLinear

INPUTS = 4
"""Different inputs that the runs take in turn."""


def random_layer(n: int, k: int, rank: int, device: torch.device, generator: torch.Generator) -> SVDQLinear:
    """A layer of the proportions that quantizing a Gaussian weight gives."""
    layer = SVDQLinear(k, n, rank, device=device)
    with torch.no_grad():
        layer.qweight.copy_(torch.randint(0, 256, layer.qweight.shape, generator=generator, dtype=torch.uint8))
        layer.wscales.copy_((torch.rand(layer.wscales.shape, generator=generator) + 0.5) * 0.1 / k**0.5)
        layer.smooth_factor.copy_(torch.rand(k, generator=generator) + 0.5)
        layer.proj_down.copy_(torch.randn(k, rank, generator=generator) / k**0.5)
        layer.proj_up.copy_(torch.randn(n, rank, generator=generator) / rank**0.5)
        layer.bias.copy_(torch.randn(n, generator=generator))
    return layer


def outlier_input(rows: int, channels: int, generator: torch.Generator) -> Tensor:
    """Gaussian with a few channels thirty times as large, as diffusion transformers have them."""
    x = torch.randn(rows, channels, generator=generator)
    x[:, torch.randperm(channels, generator=generator)[: channels // 64]] *= 30
    return x.bfloat16()


def check(layer: SVDQLinear, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Refuse to time a layer that computes something else."""
    exact = x.double() @ weight.double().T + bias.double()
    error = float((layer(x).double() - exact).norm() / exact.norm())
    if not error < 0.05:
        raise SystemExit(f"the layer is off by {error:.1%} from float64; no speed is recorded")


def measure(rows: int, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Time one case and return its record."""
    generator = torch.Generator().manual_seed(arguments.seed)
    layer = random_layer(arguments.n, arguments.k, arguments.rank, device, generator)
    weight, bias = (t.to(device) for t in layer.weights().dense())
    inputs = [outlier_input(rows, arguments.k, generator).to(device) for _ in range(INPUTS)]
    check(layer, inputs[0][:8], weight, bias)
    baselines = {"torch-bf16": torch.bfloat16, "torch-fp32": torch.float32}
    candidates: dict[str, list[Callable[[], Any]]] = {"tonfa": [partial(layer, x) for x in inputs]}
    for name, dtype in baselines.items():
        dense = (weight.to(dtype), bias.to(dtype))
        candidates[name] = [partial(functional.linear, x.to(dtype), *dense) for x in inputs]
    runs = arguments.runs or (100 if rows <= 1024 else 20)
    timings = interleaved(candidates, runs, device)

    policy = default_activations(device)
    packed = sum(t.numel() * t.itemsize for t in layer.state_dict().values())
    for name, timing in timings.items():
        ratio, ratio_least = timing.median / timings["tonfa"].median, timing.least / timings["tonfa"].least
        times = f"median {timing.median:8.2f} ms  min {timing.least:8.2f}  max {timing.most:8.2f}"
        print(f"{rows:6d} rows  {name:10s}  {times}  {ratio:5.2f}x ({ratio_least:.2f}x by minima)")
    return record(
        bench="linear",
        case={"m": rows, "n": arguments.n, "k": arguments.k, "rank": arguments.rank, "seed": arguments.seed},
        variant=f"SVDQLinear int4 weights, {policy} activations",
        settings={"weights": "int4", "activations": policy, "backend": layer.binding().kernels.backend},
        timing=timings["tonfa"],
        device=device,
        baselines={name: timings[name] for name in baselines},
        memory_gib={"weights": packed / 2**30, "weights_bf16": weight.numel() * 2 / 2**30},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 4608], help="numbers of rows, a case each")
    parser.add_argument("--n", type=int, default=3072, help="out channels")
    parser.add_argument("--k", type=int, default=3072, help="in channels")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--runs", type=int, help="timed runs a case (default: 100, from 1025 rows on 20)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--results", type=Path, help="file to append to (default: results/<device>.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        for rows in arguments.rows:
            line = measure(rows, arguments, arguments.device)
            if not arguments.dry_run:
                append(arguments.results or results_file(arguments.device), line)


if __name__ == "__main__":
    main()
