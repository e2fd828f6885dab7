"""Host memory of a full-size 4-bit FLUX.1 Depth transformer on the CPU, filled with random weights and run once.

    python benchmarks/memory.py                        512 x 512 pixels, 512 text tokens
    python benchmarks/memory.py --size 256 --dry-run

Appends one record to results/<device>.jsonl: bytes of the tensors, resident memory after binding, and the peak of the
process over the whole forward pass. Needs Linux, and about 8 GiB of free memory.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

import torch

from tonfa.bench.protocol import append, interleaved, record, results_file
from tonfa.bench.synthetic import FULL, quantized_model, step_inputs
from tonfa.layers.bound import BoundModule


def resident_gib() -> float:
    """Resident memory of this process now."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 2**20
    raise SystemExit("/proc/self/status has no VmRSS line")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--results", type=Path, help="file to append to (default: results/<device>.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    before = resident_gib()
    model = quantized_model(FULL, arguments.rank, device)
    tensors = sum(t.numel() * t.itemsize for t in model.state_dict().values()) / 2**30
    for layer in model.modules():
        if isinstance(layer, BoundModule):
            layer.binding()
    bound = resident_gib() - before
    call = step_inputs(FULL, arguments.size, arguments.size, text_tokens=arguments.text_tokens)
    with torch.inference_mode():
        timing = interleaved({"step": [lambda: model(**call)]}, runs=1, device=device, warmup=0)["step"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    memory = {"weights": tensors, "bound": bound, "peak": peak - before, "process_before": before, "process_peak": peak}
    print(f"{timing.median / 1e3:.1f} s; GiB: " + ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items()))
    line = record(
        bench="memory",
        case={
            "height": arguments.size,
            "width": arguments.size,
            "batch": 1,
            "text_tokens": arguments.text_tokens,
            "rank": arguments.rank,
        },
        variant="tonfa int4 weights, int8 activations, random weights",
        settings={"weights": "int4", "activations": "int8", "backend": "cpu"},
        timing=timing,
        device=device,
        memory_gib=memory,
    )
    if not arguments.dry_run:
        append(arguments.results or results_file(device), line)


if __name__ == "__main__":
    main()
