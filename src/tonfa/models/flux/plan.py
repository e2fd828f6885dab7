"""FLUX's plan: which linear of the fused model is made of which Diffusers weights, and which share an input.

The fused model stacks q, k and v, splits a single block's `proj_out` at the border between its attention and its MLP
channels (`proj_out([a, m]) = out(a) + down(m)`, the bias stays with the second), and keeps the embedders, the norms
and the output layer in 16 bits: the layers and precisions of the published FLUX checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tonfa.errors import CheckpointError
from tonfa.plan import BlockPlan, LinearPlan, ModelPlan

DENSE_CLASS = "FluxTransformer2DModel"
"""Diffusers' name of the 16-bit model."""

MLP_RATIO = 4

_OUTER_LINEARS = ("x_embedder", "context_embedder", "norm_out.linear", "proj_out")
_TIME_TEXT_LINEARS = ("timestep_embedder", "text_embedder")


@dataclass(frozen=True)
class FluxDims:
    """The numbers of a FLUX configuration that the plan depends on."""

    hidden_size: int
    num_layers: int
    num_single_layers: int
    guidance_embeds: bool


_LARGEST = {
    "patch_size": 64,
    "in_channels": 2**16,
    "out_channels": 2**16,
    "num_layers": 256,
    "num_single_layers": 256,
    "attention_head_dim": 2**12,
    "num_attention_heads": 2**12,
    "joint_attention_dim": 2**17,
    "pooled_projection_dim": 2**17,
}
_MAY_BE_0 = ("num_layers", "num_single_layers")


def check_counts(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raise CheckpointError for absurd sizes, before modules or plans are made of them."""
    for name, largest in _LARGEST.items():
        value = config.get(name, 1)
        least = 0 if name in _MAY_BE_0 else 1
        optional = name == "out_channels" and value is None
        if not optional and (type(value) is not int or not least <= value <= largest):
            expected = f"an integer of {least} to {largest}"
            raise CheckpointError(f"{where}: {name} is {value!r}, expected {expected}")


def flux_dims(config: Mapping[str, Any], where: str = "config.json") -> FluxDims:
    """What the plan depends on; keys that are missing have Diffusers' defaults. Raises CheckpointError for nonsense."""
    check_counts(config, where)
    return FluxDims(
        config.get("num_attention_heads", 24) * config.get("attention_head_dim", 128),
        config.get("num_layers", 19),
        config.get("num_single_layers", 38),
        bool(config.get("guidance_embeds", False)),
    )


def _outer(dims: FluxDims) -> BlockPlan:
    embedders = (*_TIME_TEXT_LINEARS, *(("guidance_embedder",) if dims.guidance_embeds else ()))
    linears = (*_OUTER_LINEARS, *(f"time_text_embed.{e}.linear_{i}" for e in embedders for i in (1, 2)))
    names = [f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")]
    return BlockPlan("outer", (), tuple((name, name) for name in names))


def _modulation(name: str, hidden: int, chunks: int) -> LinearPlan:
    """Chunks are shift, scale, gate (twice in a double block); chunks 1 and `chunks - 2` are scales."""
    scales = sorted({1, chunks - 2})
    rows = tuple((c * hidden, (c + 1) * hidden) for c in scales)
    return LinearPlan(name, (name,), chunks * hidden, hidden, "w4a16", plus_one=rows)


def _double_block(index: int, hidden: int) -> BlockPlan:
    p = f"transformer_blocks.{index}"
    mlp = MLP_RATIO * hidden
    linears = []
    streams = (
        ("norm1.linear", "to_qkv", ("to_q", "to_k", "to_v"), "to_out", "to_out.0", "ff"),
        (
            "norm1_context.linear",
            "add_qkv_proj",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
            "to_add_out",
            "to_add_out",
            "ff_context",
        ),
    )
    for modulation, qkv, qkv_sources, out, out_source, ff in streams:
        linears += [
            _modulation(f"{p}.{modulation}", hidden, 6),
            LinearPlan(f"{p}.attn.{qkv}", tuple(f"{p}.attn.{s}" for s in qkv_sources), 3 * hidden, hidden),
            LinearPlan(f"{p}.attn.{out}", (f"{p}.attn.{out_source}",), hidden, hidden),
            LinearPlan(f"{p}.{ff}.up", (f"{p}.{ff}.net.0.proj",), mlp, hidden),
            LinearPlan(f"{p}.{ff}.down", (f"{p}.{ff}.net.2",), hidden, mlp, unsigned=True),
        ]
    norms = [f"{p}.attn.{n}.weight" for n in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")]
    return BlockPlan(p, tuple(linears), tuple((n, n) for n in norms))


def _single_block(index: int, hidden: int) -> BlockPlan:
    p = f"single_transformer_blocks.{index}"
    mlp = MLP_RATIO * hidden
    qkv = f"{p}.attn.to_qkv"
    proj_out = (f"{p}.proj_out",)
    linears = (
        _modulation(f"{p}.norm.linear", hidden, 3),
        LinearPlan(qkv, tuple(f"{p}.attn.{s}" for s in ("to_q", "to_k", "to_v")), 3 * hidden, hidden),
        LinearPlan(f"{p}.attn.to_out", proj_out, hidden, hidden, columns=(0, hidden), source_bias=False),
        LinearPlan(f"{p}.ff.up", (f"{p}.proj_mlp",), mlp, hidden, shares_input=qkv),
        LinearPlan(f"{p}.ff.down", proj_out, hidden, mlp, columns=(hidden, hidden + mlp), unsigned=True),
    )
    norms = [f"{p}.attn.{n}.weight" for n in ("norm_q", "norm_k")]
    return BlockPlan(p, linears, tuple((n, n) for n in norms))


def flux_plan(dims: FluxDims) -> ModelPlan:
    """The plan of a FLUX transformer of these dimensions."""
    doubles = (_double_block(i, dims.hidden_size) for i in range(dims.num_layers))
    singles = (_single_block(i, dims.hidden_size) for i in range(dims.num_single_layers))
    return ModelPlan((_outer(dims), *doubles, *singles))
