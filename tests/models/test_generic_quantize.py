"""Any model: PixArt data-free and calibrated against its 16-bit self, shared inputs seen, misfits named."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel
from generic_models import BLOCK, PIXART_PLAN, output, pixart, pixart_sample
from torch import Tensor, nn

import tonfa
from support import relative_error
from tonfa import FormatError, LinearRule, Plan, Recipe, SVDQLinear, UnsupportedError
from tonfa.layers.modulation import W4A16Linear
from tonfa.models.flux.plan import FluxDims, flux_plan
from tonfa.models.generic.inputs import shared_inputs
from tonfa.models.generic.plan import linears_of, resolve
from tonfa.plan import BlockPlan, LinearPlan, ModelPlan

RECIPE = Recipe(rank=16, iterations=2)
HELD_OUT = (100, 101)
SAMPLES = [pixart_sample(seed) for seed in range(4)]
ATTENTION = rf"{BLOCK}\.attn1\.to_[qkv]"


@pytest.fixture(scope="module")
def dense() -> PixArtTransformer2DModel:
    return pixart()


@pytest.fixture(scope="module")
def data_free(dense: PixArtTransformer2DModel) -> PixArtTransformer2DModel:
    return tonfa.quantize(copy.deepcopy(dense), PIXART_PLAN, recipe=RECIPE)


@pytest.fixture(scope="module")
def calibrated(dense: PixArtTransformer2DModel) -> PixArtTransformer2DModel:
    return tonfa.quantize(copy.deepcopy(dense), PIXART_PLAN, iter(SAMPLES), recipe=RECIPE)


def held_out(model: nn.Module) -> Tensor:
    return torch.stack([output(model, seed) for seed in HELD_OUT])


def test_every_named_linear_is_four_bit_and_no_other(data_free: nn.Module, dense: nn.Module) -> None:
    four_bit = {name for name, m in data_free.named_modules() if isinstance(m, SVDQLinear)}
    assert four_bit == {name for name in linears_of(dense) if name.startswith("transformer_blocks")}
    assert {n for n, m in data_free.named_modules() if isinstance(m, SVDQLinear) and m.unsigned} == {
        f"transformer_blocks.{i}.ff.net.2" for i in (0, 1)
    }


@pytest.mark.parametrize(("activations", "bound"), [("none", 0.06), ("int8", 0.06), ("int4", 0.12)])
def test_calibration_helps_on_held_out_inputs(
    dense: nn.Module, data_free: nn.Module, calibrated: nn.Module, activations: str, bound: float
) -> None:
    exact = held_out(dense)
    without = relative_error(held_out(tonfa.set_activations(data_free, activations)), exact)
    with_data = relative_error(held_out(tonfa.set_activations(calibrated, activations)), exact)
    assert without < bound
    assert with_data < 0.5 * without


@pytest.mark.parametrize("activations", ["int4", "int8"])
def test_kernels_compute_the_reference_arithmetic(calibrated: nn.Module, activations: str) -> None:
    reference = held_out(tonfa.set_activations(calibrated, activations, "reference"))
    assert relative_error(held_out(tonfa.set_activations(calibrated, activations)), reference) < 1e-3


def test_without_activation_rounding_it_is_the_dense_model_of_its_weights(
    dense: PixArtTransformer2DModel, calibrated: nn.Module
) -> None:
    rounded = copy.deepcopy(dense)
    linears = linears_of(rounded)
    for name, layer in calibrated.named_modules():
        if isinstance(layer, SVDQLinear):
            weight, bias = layer.weights().dense()
            linears[name].load_state_dict({"weight": weight, "bias": bias})
    assert relative_error(held_out(tonfa.set_activations(calibrated, "none")), held_out(rounded)) < 1e-5


def test_bfloat16_models_stay_bfloat16() -> None:
    model = pixart(torch.bfloat16)
    exact = output(model, 100, torch.bfloat16)
    tonfa.quantize(model, PIXART_PLAN, recipe=RECIPE, activations="int8")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.uint8}
    assert relative_error(output(model, 100, torch.bfloat16), exact) < 0.06


def test_shared_inputs_share_smoothing_factors(calibrated: nn.Module) -> None:
    for i in (0, 1):
        attention = calibrated.get_submodule(f"transformer_blocks.{i}.attn1")
        assert torch.equal(attention.to_q.smooth_factor, attention.to_k.smooth_factor)
        assert torch.equal(attention.to_q.smooth_factor, attention.to_v.smooth_factor)
        cross = calibrated.get_submodule(f"transformer_blocks.{i}.attn2")
        assert torch.equal(cross.to_k.smooth_factor, cross.to_v.smooth_factor)
        assert not torch.equal(cross.to_q.smooth_factor, cross.to_k.smooth_factor)


def test_inputs_that_all_blocks_read_are_seen_across_them(dense: nn.Module) -> None:
    found = shared_inputs(dense, linears_of(dense), SAMPLES[0])
    assert {n: lead for n, lead in found.items() if ".attn2." in n} == {
        "transformer_blocks.0.attn2.to_v": "transformer_blocks.0.attn2.to_k",
        "transformer_blocks.1.attn2.to_k": "transformer_blocks.0.attn2.to_k",
        "transformer_blocks.1.attn2.to_v": "transformer_blocks.0.attn2.to_k",
    }


def test_changed_or_reused_memory_is_another_input() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            first = self.a(x)
            x += 1
            second = self.b(x)
            return first + second + self.c(x * 2) + self.d(x * 3)  # the products may be given the same memory

    model = Changing()
    assert shared_inputs(model, linears_of(model), ((torch.randn(4, 64),), {})) == {}


def test_detection_agrees_with_the_plan_of_flux() -> None:
    """On the Diffusers model: the sources that FLUX's plan stacks, and the linears that it says share an input."""
    flux = FluxTransformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        in_channels=64,
        axes_dims_rope=(16, 24, 24),
    )
    sample = {
        "hidden_states": torch.randn(1, 4, 64),
        "encoder_hidden_states": torch.randn(1, 3, 64),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    own = flux_plan(FluxDims(128, 1, 1, False))
    named = {linear.name: linear for linear in own.linears() if linear.kind == "svdq"}
    expected: dict[str, set[str]] = {}
    for linear in named.values():
        leader = named[linear.shares_input] if linear.shares_input else linear
        expected.setdefault(leader.sources[0], set()).update(linear.sources)
    plan = Plan((r"(single_)?transformer_blocks\..*",), exclude=(r".*\.norm.*",))
    entries = {entry.name for entry in resolve(plan, flux, 16).plan.linears()}
    linears = {name: linear for name, linear in linears_of(flux).items() if name in entries}
    found: dict[str, set[str]] = {name: {name} for name in linears}
    for name, leader in shared_inputs(flux, linears, ((), sample)).items():
        found[leader] |= found.pop(name)
    assert {frozenset(group) for group in found.values()} == {frozenset(group) for group in expected.values()}


def test_named_sharing_equals_detected(dense: nn.Module, calibrated: nn.Module) -> None:
    plan = Plan((ATTENTION,), shared_inputs=(rf"({BLOCK}\.attn1)\..*",), detect_shared=False)
    model = tonfa.quantize(copy.deepcopy(dense), plan, SAMPLES, recipe=RECIPE)
    name = "transformer_blocks.1.attn1.to_k"
    for field, tensor in model.get_submodule(name).state_dict().items():
        assert torch.equal(tensor, calibrated.get_submodule(name).state_dict()[field])


def test_columns_without_data_are_those_of_all_that_share(dense: nn.Module) -> None:
    plan = Plan((ATTENTION,), shared_inputs=(rf"({BLOCK}\.attn1)\..*",))
    recipe = replace(RECIPE, column_power=0.5, iterations=0)
    model = tonfa.quantize(copy.deepcopy(dense), plan, recipe=recipe)
    both = dense.get_submodule("transformer_blocks.0.attn1")
    columns = torch.cat([both.to_q.weight, both.to_k.weight, both.to_v.weight]).square().mean(dim=0).sqrt()
    for linear in ("to_q", "to_k", "to_v"):
        found = model.get_submodule(f"transformer_blocks.0.attn1.{linear}").smooth_factor
        assert torch.allclose(found, columns**-0.5)


def test_rounds_do_not_change_the_result(dense: nn.Module) -> None:
    plan = Plan((rf"{BLOCK}\.ff\.net\.0\.proj",))
    whole, rounds = (
        tonfa.quantize(copy.deepcopy(dense), plan, SAMPLES[:2], recipe=RECIPE, moments_limit=limit)
        for limit in (2**30, 1)
    )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, rounds.state_dict()[name]), name


def test_modulations_and_ranks_by_rule(dense: nn.Module) -> None:
    plan = Plan((LinearRule(r"adaln_single\.linear", kind="w4a16"), LinearRule(ATTENTION, rank=32)))
    model = tonfa.quantize(copy.deepcopy(dense), plan, recipe=RECIPE, activations="int8")
    assert isinstance(model.get_submodule("adaln_single.linear"), W4A16Linear)
    assert model.get_submodule("transformer_blocks.0.attn1.to_q").rank == 32
    assert relative_error(held_out(model), held_out(dense)) < 0.05


def test_w4a16_takes_leading_dimensions() -> None:
    model = nn.Sequential(nn.Linear(64, 48))
    tonfa.quantize(model, Plan((LinearRule("0", kind="w4a16"),)))
    x = torch.randn(2, 3, 64)
    assert torch.equal(model(x), torch.stack([model(row) for row in x]))


def test_a_linear_with_two_names_is_replaced_in_both_places() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 64)})
    model["b"] = model["a"]
    tonfa.quantize(model, Plan(("a",)), recipe=RECIPE)
    assert isinstance(model["b"], SVDQLinear)
    assert model["a"] is model["b"]


def test_modes_are_put_back_and_dropout_is_off_while_calibrating() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5)).train()
    model[2].eval()
    x = torch.randn(200, 64)
    seen: list[Tensor] = []
    handle = model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tonfa.quantize(model, Plan(("1",)), [((x,), {})], recipe=RECIPE)
    handle.remove()
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(s, x) for s in seen)


ODD = {"fits": nn.Linear(64, 64), "odd": nn.Linear(72, 64), "thin": nn.Linear(64, 8)}


def test_sizes_that_do_not_fit_are_named_or_skipped(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict(copy.deepcopy(ODD))
    with pytest.raises(FormatError, match=r"odd: its 72 input channels are no multiple of the group size 64"):
        tonfa.quantize(model, Plan((".*",)), recipe=RECIPE)
    with pytest.raises(FormatError, match=r"thin: rank 16 exceeds the smaller side of 8 x 64"):
        tonfa.quantize(model, Plan((".*",), exclude=("odd",)), recipe=RECIPE)
    assert all(type(m) is nn.Linear for m in model.values())
    with caplog.at_level(logging.WARNING, "tonfa"):
        tonfa.quantize(model, Plan((".*",), skip_unsupported=True), recipe=RECIPE)
    assert [type(m) for m in model.values()] == [SVDQLinear, nn.Linear, nn.Linear]
    assert [r.getMessage().partition(" ")[0] for r in caplog.records] == ["odd", "thin"]


def test_linears_that_are_read_without_a_call_are_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(64, 1))
    with pytest.raises(FormatError, match=r"0\.out_proj: its owner reads its weight"):
        tonfa.quantize(model, Plan((".*",)), recipe=RECIPE)
    encoder = nn.Sequential(nn.TransformerEncoderLayer(64, 1, 64))
    with pytest.raises(FormatError, match=r"0\.linear1: its owner reads its weight"):
        tonfa.quantize(encoder, Plan((r".*\.linear[12]",)), recipe=RECIPE)


def spoil_weight(model: nn.Module, samples: list[tuple[tuple[Tensor, ...], dict[str, object]]]) -> None:
    model.get_submodule("transformer_blocks.1.attn1.to_k").weight.data[3, 4] = torch.nan


def spoil_input(model: nn.Module, samples: list[tuple[tuple[Tensor, ...], dict[str, object]]]) -> None:
    samples[0][0][0][0, 0, 0, 0] = torch.inf


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_weight, r"transformer_blocks\.1\.attn1\.to_k\.weight: holds NaN"),
        (spoil_input, r"transformer_blocks\.0\.attn1\.to_q: \d+ channels of its calibration inputs hold NaN or Inf"),
    ],
)
def test_nan_and_inf_are_named_and_the_model_stays(spoil: Callable[..., None], message: str, dense: nn.Module) -> None:
    model, samples = copy.deepcopy(dense), [pixart_sample(0)]
    spoil(model, samples)
    plan = Plan((r"transformer_blocks\.0\.attn1\.to_q", r"transformer_blocks\.1\.attn1\.to_k"))
    with pytest.raises(FormatError, match=message):
        tonfa.quantize(model, plan, samples if spoil is spoil_input else None, recipe=RECIPE)
    assert not any(isinstance(m, SVDQLinear) for m in model.modules())


def test_unsigned_needs_the_output_of_a_gelu(dense: nn.Module) -> None:
    plan = Plan((LinearRule(r"transformer_blocks\.0\.attn1\.to_q", unsigned=True),))
    with pytest.raises(FormatError, match=r"attn1\.to_q: its inputs fall to -.*must not say unsigned"):
        tonfa.quantize(copy.deepcopy(dense), plan, SAMPLES[:1], recipe=RECIPE)


def test_a_linear_that_no_input_reaches_is_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(64, 64), "idle": nn.Linear(64, 64)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(FormatError, match="idle: no calibration input has reached it"):
        tonfa.quantize(model, Plan((".*",)), [((torch.randn(9, 64),), {})], recipe=RECIPE)


def test_sharing_that_is_not_so_is_refused(dense: nn.Module) -> None:
    plan = Plan((rf"{BLOCK}\.attn2\.to_[qkv]",), shared_inputs=(rf"({BLOCK}\.attn2)\..*",))
    with pytest.raises(FormatError, match=r"attn2\.to_k: does not read the input of .*\.0\.attn2\.to_q"):
        tonfa.quantize(copy.deepcopy(dense), plan, SAMPLES[:1], recipe=RECIPE)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (lambda: Plan(()), "include must"),
        (lambda: Plan("a.*"), "include must"),
        (lambda: Plan((3,)), "3 is no pattern"),
        (lambda: Plan((LinearRule("fits", kind="w8a8"),)), "kind 'w8a8' is unknown; choose one of svdq, w4a16"),
        (lambda: Plan(("fits",), exclude="odd"), "exclude must be a sequence of patterns, got 'odd'"),
        (lambda: Plan(("fits",), shared_inputs=(None,)), "shared_inputs must be a sequence of patterns"),
        (lambda: ("fits",), r"plan: expected a Plan, got \('fits',\)"),
        (lambda: Plan(("(",)), r"'\(' is no regular expression"),
        (lambda: Plan(("a",), shared_inputs=("a",)), "captures nothing"),
        (lambda: Plan(("to_q",)), r"'to_q' matches no torch\.nn\.Linear of the model; its linears are fits, odd, thin"),
        (lambda: Plan(("fits",), exclude=("f.*",)), "no linear is left"),
    ],
)
def test_plans_that_mean_nothing_are_refused(plan: Callable[[], Plan], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        tonfa.quantize(nn.ModuleDict(ODD), plan(), recipe=RECIPE)


def test_a_recipe_is_no_name() -> None:
    with pytest.raises(UnsupportedError, match="recipe: expected a Recipe, got 'svdquant'"):
        tonfa.quantize(nn.ModuleDict(ODD), Plan(("fits",)), recipe="svdquant")


@pytest.mark.parametrize("inputs", [[], [torch.zeros(2)], [((torch.zeros(2),), None)]])
def test_inputs_that_are_no_samples_are_refused(inputs: list[object]) -> None:
    with pytest.raises(FormatError, match="inputs: "):
        tonfa.quantize(nn.ModuleDict(ODD), Plan(("fits",)), inputs, recipe=RECIPE)


def test_a_plan_of_single_linears_is_taken_as_it_is_and_fluxs_is_not(dense: nn.Module, data_free: nn.Module) -> None:
    name = "transformer_blocks.0.attn1.to_q"
    plan = ModelPlan((BlockPlan("one", (LinearPlan(name, (name,), 128, 128),)),))
    model = tonfa.quantize(copy.deepcopy(dense), plan, recipe=RECIPE)
    layer = model.get_submodule(name)
    assert torch.equal(layer.qweight, data_free.get_submodule(name).qweight)
    with pytest.raises(UnsupportedError, match="stacks or cuts"):
        tonfa.quantize(copy.deepcopy(dense), flux_plan(FluxDims(128, 1, 0, False)), recipe=RECIPE)
