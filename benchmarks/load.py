"""Loading a full-size Nunchaku checkpoint of FLUX.1 Depth: time, host memory and GPU memory.

    python benchmarks/load.py synthetic.safetensors --make          writes 2,604 tensors of random content, 6.7 GB
    python benchmarks/load.py synthetic.safetensors                 loads it, appends one record to results/
    python benchmarks/load.py synthetic.safetensors --device cuda

The file is read once before, so that the disk's cache is warm, as the figures are meant.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memory import resident_gib
from tonfa import SVDQFluxTransformer2DModel
from tonfa.bench.protocol import Timing, append, record, results_file
from tonfa.bench.synthetic import FULL
from tonfa.checkpoint.shards import write_tensors
from tonfa.checkpoint.strict import Spec
from tonfa.models.flux.nunchaku import packed_tensors
from tonfa.models.flux.plan import FluxDims, flux_plan

DIMS = FluxDims(hidden_size=3072, num_layers=19, num_single_layers=38, guidance_embeds=True)
TENSORS = 2604
"""Of the published FLUX.1-dev and FLUX.1-Depth-dev checkpoints."""


class RandomTensors(Mapping[str, Tensor]):
    """Random tensors of a spec: any code, small scales, a smoothing factor around one."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec

    def __getitem__(self, name: str) -> Tensor:
        shape, dtype = self._spec[name]
        if not dtype.is_floating_point:
            count = math.prod(shape) * dtype.itemsize
            return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).view(shape)
        if "smooth" in name:
            return torch.rand(shape).add_(0.5).to(dtype)
        return torch.rand(shape, dtype=torch.float32).mul_(0.01).to(dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spec)

    def __len__(self) -> int:
        return len(self._spec)


def make(path: Path, rank: int) -> None:
    """Write a checkpoint with the names, shapes and dtypes of the published one."""
    with torch.device("meta"):
        model = SVDQFluxTransformer2DModel(**FULL, quantization_config={"rank": rank})
    copies = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    packed = packed_tensors(flux_plan(DIMS), rank, torch.bfloat16, "v1", copies).values()
    spec = {tensor.name: (tensor.shape, tensor.dtype) for tensor in packed}
    spec |= {name + "_orig": entry for name, entry in spec.items() if name.endswith(".smooth")}
    if len(spec) != TENSORS:
        raise SystemExit(f"{len(spec)} tensors, expected {TENSORS}")
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    config.pop("quantization_config")
    write_tensors(path, RandomTensors(spec), metadata={"config": json.dumps(config)}, spec=spec)
    print(f"{path}: {len(spec)} tensors, {path.stat().st_size / 1e9:.2f} GB")


def load(path: Path, device: torch.device) -> tuple[Timing, dict[str, float]]:
    """One load, from a warm disk cache."""
    with path.open("rb") as file:
        while file.read(1 << 26):
            pass
    before, started = resident_gib(), time.perf_counter()
    model = SVDQFluxTransformer2DModel.from_pretrained(path, device=device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    weights = sum(t.numel() * t.itemsize for t in model.state_dict().values()) / 2**30
    memory = {
        "file": path.stat().st_size / 2**30,
        "weights": weights,
        "process_before": before,
        "process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if device.type == "cuda":
        memory["gpu_peak"] = torch.cuda.max_memory_allocated() / 2**30
    return Timing(seconds * 1e3, seconds * 1e3, seconds * 1e3, 1), memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--make", action="store_true", help="write the file instead of loading it")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, help="file to append to (default: results/<device>.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.path, arguments.rank)
        return
    device = torch.device(arguments.device)
    timing, memory = load(arguments.path, device)
    print(f"{timing.median / 1e3:.1f} s; GiB: " + ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items()))
    case: dict[str, Any] = {"container": "nunchaku single file", "tensors": TENSORS, "rank": arguments.rank}
    line = record(
        bench="load",
        case=case,
        variant="SVDQFluxTransformer2DModel.from_pretrained",
        settings={"weights": "int4", "device": device.type},
        timing=timing,
        device=device,
        memory_gib=memory,
    )
    if not arguments.dry_run:
        append(arguments.results or results_file(device), line)


if __name__ == "__main__":
    main()
