"""The work of one FLUX step, counted from the configuration: what any implementation has to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tonfa.bench.synthetic import tokens
from tonfa.formats import GROUP_SIZE
from tonfa.models.flux.plan import FluxDims, flux_plan

_TEXT_LINEARS = ("add_qkv_proj", "to_add_out", "ff_context")
_CODES = 1  # bytes of an 8-bit activation
_WIDE = 2  # bytes of a 16-bit number


@dataclass(frozen=True)
class Work:
    """FLOPs (a multiplication and an addition are two) and bytes of one step."""

    rows: int
    """Text and image tokens of the whole batch."""
    shapes: tuple[tuple[int, int], ...]
    """(N, K) of the quantized linears, each once."""
    linear_flops: int
    """Products with the 4-bit weights."""
    lowrank_flops: int
    """Down- and up-projections of the 16-bit branches."""
    attention_flops: int
    outer_flops: int
    """Embedders and output layer, in 16 bits."""
    quantize_bytes: int
    """Every input of a quantized linear read once in 16 bits and written once in 8, but for those behind a GELU: the
    product in front of it writes them."""
    packed_bytes: int
    """4-bit codes and scales of the quantized linears."""
    modulation_bytes: int
    """4-bit codes, scales and zeros of the modulations."""


def rows_of(linear: str, image: int, text: int, batch: int) -> int:
    """Tokens that the linear of this name reads: of the image, of the text, or in single blocks of both."""
    if linear.startswith("single"):
        return batch * (image + text)
    return batch * (text if any(name in linear for name in _TEXT_LINEARS) else image)


def flux_work(config: Mapping[str, Any], height: int, width: int, batch: int, text_tokens: int, rank: int) -> Work:
    """Of a step on pictures of height x width pixels."""
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    hidden, layers, single = heads * head_dim, config["num_layers"], config["num_single_layers"]
    image = tokens(height, width)
    length = image + text_tokens
    linear = lowrank = quantize = packed = modulation = 0
    shapes = {}
    for plan in flux_plan(FluxDims(hidden, layers, single, bool(config.get("guidance_embeds")))).linears():
        n, k = plan.out_features, plan.in_features
        codes, scales = n * k // 2, n * k // GROUP_SIZE * _WIDE
        if plan.kind == "w4a16":
            modulation += codes + 2 * scales
            continue
        rows = rows_of(plan.name, image, text_tokens, batch)
        shapes[n, k] = True
        linear += 2 * rows * n * k
        lowrank += 2 * rows * rank * (n + k)
        packed += codes + scales
        if plan.shares_input is None and not plan.unsigned:
            quantize += rows * k * (_WIDE + _CODES)
    outer = image * (config["in_channels"] + (config.get("out_channels") or config["in_channels"]))
    outer += text_tokens * config["joint_attention_dim"]
    return Work(
        rows=batch * length,
        shapes=tuple(shapes),
        linear_flops=linear,
        lowrank_flops=lowrank,
        attention_flops=(layers + single) * batch * 4 * length**2 * hidden,
        outer_flops=batch * 2 * outer * hidden,
        quantize_bytes=quantize,
        packed_bytes=packed,
        modulation_bytes=modulation,
    )
