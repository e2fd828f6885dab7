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
from typing import Any

import torch
from torch import Tensor

from protocol import append, interleaved, record, results_file
from tonfa import SVDQFluxTransformer2DModel
from tonfa.layers.bound import BoundModule

CONFIG: dict[str, Any] = {"in_channels": 128, "out_channels": 64, "guidance_embeds": True}
"""FLUX.1 Depth; all else is the default: 19 double and 38 single blocks, 24 heads of 128."""


def resident_gib() -> float:
    """Resident memory of this process now."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 2**20
    raise SystemExit("/proc/self/status has no VmRSS line")


def random_model(rank: int) -> SVDQFluxTransformer2DModel:
    """The full-size model in bf16, every page of its tensors written."""
    with torch.device("meta"):
        model: SVDQFluxTransformer2DModel = SVDQFluxTransformer2DModel(**CONFIG, quantization_config={"rank": rank})
    model.to(torch.bfloat16).to_empty(device="cpu").eval()
    for name, tensor in model.state_dict().items():
        if tensor.dtype == torch.uint8:
            tensor.random_(0, 256)
        else:
            tensor.fill_(1.0 if name.endswith(("smooth_factor", "norm_q", "norm_k")) else 1e-3)
    return model


def inputs(size: int, text_tokens: int) -> dict[str, Tensor]:
    """One image of size x size pixels, as FluxControlPipeline calls its transformer."""
    side = size // 16
    ids = torch.zeros(side, side, 3)
    ids[..., 1] += torch.arange(side)[:, None]
    ids[..., 2] += torch.arange(side)[None, :]
    return {
        "hidden_states": torch.randn(1, side * side, CONFIG["in_channels"]).bfloat16(),
        "encoder_hidden_states": torch.randn(1, text_tokens, 4096).bfloat16(),
        "pooled_projections": torch.randn(1, 768).bfloat16(),
        "timestep": torch.tensor([0.5]).bfloat16(),
        "guidance": torch.tensor([10.0]),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text_tokens, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--results", type=Path, help="file to append to (default: results/<device>.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    torch.manual_seed(0)
    before = resident_gib()
    model = random_model(arguments.rank)
    tensors = sum(t.numel() * t.itemsize for t in model.state_dict().values()) / 2**30
    for layer in model.modules():
        if isinstance(layer, BoundModule):
            layer.binding()
    bound = resident_gib() - before
    call = inputs(arguments.size, arguments.text_tokens)
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
