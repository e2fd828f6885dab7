"""What the INT4 kernels should take on GPUs that nobody has measured them on: from their machine code and traffic.

Cycles come from the instructions that NVRTC makes, which tests/kernels/cuda/test_cuda_machine_code.py counts, bytes
from the shapes; docs/int4-performance.md shows the tables and says what each number rests on. `tonfa bench` prints
these times beside measured ones, so that one report of a user settles them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tonfa.bench.synthetic import tokens
from tonfa.bench.work import flux_work, rows_of
from tonfa.formats import GROUP_SIZE
from tonfa.kernels.cuda.product import TILE
from tonfa.kernels.cuda.product_gelu_quantize import tiles_of_slice
from tonfa.kernels.cuda.quantize import ROWS, rank_chunk
from tonfa.models.flux.plan import FluxDims, flux_plan
from tonfa.plan import LinearPlan

STEP_CYCLES = 512
"""Of 64 channels of a tile, for each quarter of a processor: 32 IMMA of 16 cycles on sm_86 and sm_89; 256 FFMA of 2 on
sm_80, whose IMMA take 8."""
LOOP_SHARE = 0.85
"""Of the floor's rate that the product's loop should reach: its other instructions fill 79 % of the issue slots."""
START_CYCLES = 750
"""Of a tile until its pipeline is full."""
EPILOGUE_SLOTS = {
    "product": 750,
    "product_gate_residual": 1600,
    "product_norm_rope": 2400,
    "product_gelu_quantize": 4500,
}
"""Instructions of a warp behind the product's loop, without the low-rank loops."""
QUANTIZE_SLOTS = {("quantize", 32): 1061, ("quantize", 64): 1195, ("norm_modulate_quantize", 32): 1850}
QUANTIZE_SLOTS["norm_modulate_quantize", 64] = 1915
"""Instructions of a warp for 64 channels of 32 rows; the norm's 400 for mean and deviation included."""
W4A16_SLOTS, W4A16_HMMA = 260, 16
"""Instructions of a warp, and those of the tensor core among them, for 128 channels of 32 outputs and four rows."""
BLOCKS = 2
"""Of a product on a processor at once."""
MEMORY_SHARE = 0.85
"""Of the memory's bandwidth that a kernel should reach."""
DENSE_SHARE = 0.75
"""Of the tensor cores' 16-bit rate that attention and the 16-bit layers should reach."""
_QUARTERS = 4


@dataclass(frozen=True)
class Gpu:
    """A GPU by NVIDIA's data sheets."""

    name: str
    """What its device name holds."""
    processors: int
    clock: float
    """Hz, boost."""
    bandwidth: float
    """Bytes a second."""
    bf16: float
    """FLOP a second with float32 sums."""
    hmma_cycles: int
    """Of one HMMA.16816 with float32 sums."""


GPUS = (
    Gpu("RTX 3090", 82, 1.695e9, 936e9, 71e12, 32),
    Gpu("A100", 108, 1.41e9, 1555e9, 312e12, 8),
    Gpu("RTX 4090", 128, 2.52e9, 1008e9, 165e12, 32),
)


def known_gpu(device: torch.device) -> Gpu | None:
    """The GPU of this device, if there is a prediction for it: a laptop's has other processors than a card's."""
    if device.type != "cuda":
        return None
    name, processors = (
        torch.cuda.get_device_name(device),
        torch.cuda.get_device_properties(device).multi_processor_count,
    )
    return next((gpu for gpu in GPUS if gpu.name in name and gpu.processors == processors), None)


def product_ms(
    gpu: Gpu,
    m: int,
    n: int,
    k: int,
    rank: int,
    kernel: str = "product",
    next_rank: int = 0,  # of the layer behind a GELU
) -> float:
    """A product by its kernel: whole waves of two blocks a processor, or its DRAM traffic if that takes longer."""
    lowrank = (rank + next_rank) / 16 * 32 * gpu.hmma_cycles
    tile = k / GROUP_SIZE * STEP_CYCLES / LOOP_SHARE + lowrank + START_CYCLES + EPILOGUE_SLOTS[kernel]
    tiles_m, tiles_n = -(-m // TILE), -(-n // TILE)
    each, slices, moved = 1, tiles_n, 2.0 * m * n
    if kernel == "product_gelu_quantize":
        each = tiles_of_slice(tiles_m, tiles_n, gpu.processors)
        slices = -(-tiles_n // each)
        moved = m * n * (0.5 + 2 / GROUP_SIZE)
    waves = -(-tiles_m * slices // (BLOCKS * gpu.processors))
    computing = waves * BLOCKS * each * tile / gpu.clock
    moved += (m + n) * k * (0.5 + 2 / GROUP_SIZE) + (m * 4 + n * 2) * rank
    if kernel == "product_gate_residual":
        moved += 2 * m * n
    partials = 2 * 4 * slices * m * next_rank if slices > 1 else 0
    return 1e3 * (max(computing, _moving(gpu, moved)) + _moving(gpu, partials))


def quantize_ms(gpu: Gpu, m: int, k: int, rank: int, kernel: str = "quantize") -> float:
    """Quantization with the down-projection; ranks beyond a block's read the input again, from L2."""
    chunk = rank_chunk(rank)
    slots = QUANTIZE_SLOTS[kernel, chunk]
    tensor = chunk * gpu.hmma_cycles
    warps = -(-m // ROWS) * (k / GROUP_SIZE) * max(1, -(-rank // chunk))
    computing = warps * max(slots, tensor) / (_QUARTERS * gpu.processors) / gpu.clock
    moved = m * k * (2 + 0.5 + 2 / GROUP_SIZE) + 4 * m * rank
    return 1e3 * max(computing, _moving(gpu, moved))


def w4a16_ms(gpu: Gpu, batch: int, n: int, k: int) -> float:
    """A modulation; four rows of its input read the weights once."""
    turns, cycles = -(-batch // 4), max(W4A16_SLOTS, W4A16_HMMA * gpu.hmma_cycles)
    computing = turns * n / 32 * -(-k // 128) * cycles / (_QUARTERS * gpu.processors) / gpu.clock
    return 1e3 * max(computing, _moving(gpu, turns * n * k * (0.5 + 4 / GROUP_SIZE)))


def linear_ms(gpu: Gpu, m: int, n: int, k: int, rank: int) -> float:
    """One linear with the quantization of its input."""
    return quantize_ms(gpu, m, k, rank) + product_ms(gpu, m, n, k, rank)


def step_ms(
    gpu: Gpu, config: Mapping[str, Any], height: int, width: int, batch: int, text_tokens: int, rank: int
) -> dict[str, float]:
    """Milliseconds of a FLUX step by part, named as `bench.parts` names them."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    hidden, layers, single = heads * head_dim, config["num_layers"], config["num_single_layers"]
    image, parts = tokens(height, width), dict.fromkeys(("products", "quantize", "modulation"), 0.0)
    for plan in flux_plan(FluxDims(hidden, layers, single, bool(config.get("guidance_embeds")))).linears():
        n, k = plan.out_features, plan.in_features
        if plan.kind == "w4a16":
            parts["modulation"] += w4a16_ms(gpu, batch, n, k)
            continue
        m = rows_of(plan.name, image, text_tokens, batch)
        kernel = _kernel(plan)
        following = rank if kernel == "product_gelu_quantize" else 0
        parts["products"] += product_ms(gpu, m, n, k, rank, kernel, following)
        shared = plan.name.startswith("single") and plan.name.endswith("to_qkv")
        if plan.name.endswith("out"):
            parts["quantize"] += quantize_ms(gpu, m, k, rank)
        elif plan.shares_input is None and not plan.unsigned:
            parts["quantize"] += quantize_ms(gpu, m, k, 2 * rank if shared else rank, "norm_modulate_quantize")
    work = flux_work(config, height, width, batch, text_tokens, rank)
    parts["attention"] = 1e3 * work.attention_flops / (DENSE_SHARE * gpu.bf16)
    parts["rest"] = 1e3 * work.outer_flops / (DENSE_SHARE * gpu.bf16)
    return parts


def described(gpu: Gpu, parts: Mapping[str, float]) -> dict[str, Any]:
    """A prediction, as a record holds it: value and its parts in ms, and why."""
    rounded = {name: round(value, 4) for name, value in parts.items()}
    why = f"model of an {gpu.name} in docs/int4-performance.md"
    return {"value": round(sum(parts.values()), 4), "parts": rounded, "why": why}


def _kernel(plan: LinearPlan) -> str:
    if "qkv" in plan.name:
        return "product_norm_rope"
    return "product_gelu_quantize" if plan.name.endswith("up") else "product_gate_residual"


def _moving(gpu: Gpu, amount: float) -> float:
    return amount / (MEMORY_SHARE * gpu.bandwidth)
