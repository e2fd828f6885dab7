"""A plan's linears: rows stacked, columns cut, biases where they belong, the shapes it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_flux import HIDDEN, PLAN
from torch import Tensor

from support import relative_error
from tonfa.checkpoint.tensors import TensorFolder
from tonfa.plan import LinearPlan
from tonfa.quantizer.planned import dense_spec, gather, materialize, planned_spec, quantize_planned
from tonfa.quantizer.planned import relative_error as weight_error
from tonfa.quantizer.recipe import Recipe
from tonfa.weights import SVDQWeights, W4A16Weights

RECIPE = Recipe(16, iterations=1)
LINEARS = {linear.name: linear for linear in PLAN.linears()}


@pytest.fixture(scope="module")
def source(dense: Path) -> dict[str, Tensor]:
    return dict(TensorFolder(dense))


@pytest.fixture(scope="module")
def quantized(source: dict[str, Tensor]) -> dict[str, Tensor]:
    return materialize(PLAN, source, RECIPE)


def weights(quantized: dict[str, Tensor], name: str) -> SVDQWeights | W4A16Weights:
    fields = {k.rpartition(".")[2]: t for k, t in quantized.items() if k.rpartition(".")[0] == name}
    linear = LINEARS[name]
    return W4A16Weights(**fields) if linear.kind == "w4a16" else SVDQWeights(**fields, unsigned=linear.unsigned)


def test_the_plan_needs_exactly_the_tensors_of_the_diffusers_model(dense: Path) -> None:
    spec = TensorFolder(dense).spec()
    copies = {source: spec[source] for block in PLAN.blocks for _, source in block.copies}
    assert dense_spec(PLAN, copies, torch.bfloat16) == spec


def test_planned_spec_is_what_quantizing_makes(quantized: dict[str, Tensor]) -> None:
    found = {name: (tuple(t.shape), t.dtype) for name, t in quantized.items()}
    promised = {target: found[target] for block in PLAN.blocks for target, _ in block.copies}
    for linear in PLAN.linears():
        promised |= planned_spec(linear, 16, torch.bfloat16)
    assert promised == found


def test_q_k_v_are_stacked(source: dict[str, Tensor], quantized: dict[str, Tensor]) -> None:
    p = "transformer_blocks.0.attn"
    weight, bias = weights(quantized, f"{p}.to_qkv").dense()
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(i * HIDDEN, (i + 1) * HIDDEN)
        assert relative_error(weight[rows], source[f"{p}.{name}.weight"]) < 0.1
        assert torch.equal(bias[rows], source[f"{p}.{name}.bias"].float())


def test_proj_out_of_a_single_block_is_split_and_its_bias_stays_with_the_mlp(
    source: dict[str, Tensor], quantized: dict[str, Tensor]
) -> None:
    p = "single_transformer_blocks.0"
    out, no_bias = weights(quantized, f"{p}.attn.to_out").dense()
    down, bias = weights(quantized, f"{p}.ff.down").dense()
    assert relative_error(torch.cat([out, down], dim=1), source[f"{p}.proj_out.weight"]) < 0.1
    assert not no_bias.any()
    assert torch.allclose(bias, source[f"{p}.proj_out.bias"].float(), atol=2e-2)


@pytest.mark.parametrize(
    ("name", "chunks"), [("transformer_blocks.0.norm1.linear", 6), ("single_transformer_blocks.0.norm.linear", 3)]
)
def test_modulations_hold_one_plus_scale(
    source: dict[str, Tensor], quantized: dict[str, Tensor], name: str, chunks: int
) -> None:
    weight, bias = weights(quantized, name).dense()
    assert relative_error(weight, source[f"{name}.weight"]) < 0.1
    added = (bias - source[f"{name}.bias"].float()).view(chunks, HIDDEN)
    expected = [1.0 if c in (1, chunks - 2) else 0.0 for c in range(chunks)]
    assert torch.allclose(added, torch.tensor(expected).unsqueeze(1).expand_as(added), atol=5e-3)


def test_without_a_recipe_the_linears_stay_dense(source: dict[str, Tensor]) -> None:
    dense = materialize(PLAN, source, None)
    p = "transformer_blocks.0.attn"
    stacked = torch.cat([source[f"{p}.{n}.weight"] for n in ("to_q", "to_k", "to_v")])
    assert torch.equal(dense[f"{p}.to_qkv.weight"], stacked)
    assert torch.equal(dense["x_embedder.bias"], source["x_embedder.bias"])
    assert sum(t.numel() for t in dense.values()) == sum(t.numel() for t in source.values()) + HIDDEN


def test_relative_error_of_a_known_weight() -> None:
    weight = torch.randn(64, 128)
    made = quantize_planned(LinearPlan("x", ("x",), 64, 128), weight, torch.zeros(64), RECIPE, torch.float32)
    assert weight_error(weight, made) == pytest.approx(relative_error(made.dense()[0], weight), rel=1e-4)
    assert (
        weight_error(
            torch.zeros(64, 128),
            quantize_planned(
                LinearPlan("x", ("x",), 64, 128), torch.zeros(64, 128), torch.zeros(64), RECIPE, torch.float32
            ),
        )
        == 0
    )


def test_gather_leaves_no_view_of_the_source() -> None:
    source = {"x.weight": torch.randn(8, 128), "x.bias": torch.randn(8)}
    weight, bias = gather(LinearPlan("x", ("x",), 8, 64, columns=(64, 128)), source)
    assert torch.equal(weight, source["x.weight"][:, 64:])
    weight.zero_()
    bias.zero_()
    assert source["x.weight"].all()
    assert source["x.bias"].all()
