"""Steps of FLUX with 16-bit attention, with FP8 attention whose operands are rounded by kernels of their own, and with
heads that leave the products in e4m3. For a Hopper GPU.

    python benchmarks/attention_fp8_step.py                      2 double and 4 single blocks at 1024 x 1024
    python benchmarks/attention_fp8_step.py --blocks 19 38       all of FLUX.1

Prints how far the velocities are from those of 16-bit attention, milliseconds of a step in a CUDA graph, interleaved,
and the microseconds of each kernel that only some of the ways run.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tonfa.bench.parts import profile_step
from tonfa.bench.protocol import interleaved
from tonfa.bench.synthetic import FULL, quantized_model, step_inputs
from tonfa.kernels.attention import fp8
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel

WAYS = {"16 bits": "sdpa", "FP8, rounded apart": "fp8", "FP8, rounded by the products": "fp8"}
APART = "FP8, rounded apart"


def prepared(way: str, model: SVDQFluxTransformer2DModel, call: dict[str, Any]) -> Tensor:
    """The velocity; a step of this way has been recorded then."""
    model.set_attention(WAYS[way])
    takes = (lambda shape, device: False) if way == APART else fp8.takes
    with mock.patch.object(fp8, "takes", takes):  # looked up when a block attends for the first time
        for _ in range(3):
            velocity: Tensor = model(**call, return_dict=False)[0]
    return velocity.float()


def kernels(step: Any, device: torch.device) -> dict[str, tuple[int, float]]:
    """Calls and microseconds a call, by name."""
    found: dict[str, list[float]] = defaultdict(list)
    for kernel in profile_step(step, device):
        found[kernel.name[:100]].append((kernel.end - kernel.start) * 1e3)
    return {name: (len(times), sum(times) / len(times)) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--blocks", type=int, nargs=2, default=(2, 4), help="double and single ones")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=30)
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    config = {**FULL, "num_layers": arguments.blocks[0], "num_single_layers": arguments.blocks[1]}
    call = step_inputs(config, arguments.size, arguments.size, batch=arguments.batch, device=device)
    with torch.inference_mode():
        models = {way: quantized_model(config, 32, device) for way in WAYS}
        velocities = {way: prepared(way, model, call) for way, model in models.items()}
        exact = velocities["16 bits"]
        timings = interleaved({w: [partial(m, **call)] for w, m in models.items()}, arguments.runs, device)
        seen = {way: kernels(partial(model, **call), device) for way, model in models.items()}
    for way, timing in timings.items():
        moved = float((velocities[way] - exact).norm() / exact.norm())
        print(f"{way:30s} {timing.median:8.3f} ms ({timing.least:.3f}), velocity moved by {moved:.4f}")
    for way, times in seen.items():
        print(f"\n{way}: kernels that another way does not run")
        for name, (count, each) in sorted(times.items(), key=lambda item: -item[1][0] * item[1][1]):
            if any(other.get(name, (0, 0))[0] != count for other in seen.values()):
                print(f"  {count:4d} x {each:7.1f} us  {name}")


if __name__ == "__main__":
    main()
