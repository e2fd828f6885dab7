"""With 16-bit weights the fused FLUX equals Diffusers' own to rounding: that is the test of the fusion."""

from __future__ import annotations

import copy

import pytest
import torch
from flux_models import VARIANTS, dense_model, inputs, run

from support import relative_error
from tonfa.errors import FormatError, UnsupportedError
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 3])
def test_float32_equals_diffusers(variant: str, batch: int) -> None:
    dense = dense_model(**VARIANTS[variant])
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    values = inputs(dense, batch)
    expected = run(dense, values)
    assert relative_error(run(fused, values), expected) < 2e-6
    moved = values["timestep"].clone()
    moved[-1] += 0.125
    assert relative_error(run(dense, {**values, "timestep": moved}), expected) > 1e-3  # the comparison can fail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_error_is_no_larger_than_diffusers_own(dtype: torch.dtype) -> None:
    dense = dense_model()
    exact = run(dense.double(), {k: v.double() for k, v in inputs(dense).items()})
    dense = dense.to(dtype)
    values = inputs(dense, dtype=dtype)
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    theirs, ours = relative_error(run(dense, values), exact), relative_error(run(fused, values), exact)
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("image", [(1, 1), (3, 5), (16, 16), (9, 31)])
def test_any_resolution(image: tuple[int, int]) -> None:
    dense = dense_model()
    values = inputs(dense, 2, image)
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    assert relative_error(run(fused, values), run(dense, values)) < 2e-6


def test_kontext_reference_tokens() -> None:
    dense = dense_model(**VARIANTS["dev"])
    values = inputs(dense, 1, references=1)
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    assert relative_error(run(fused, values), run(dense, values)) < 2e-6


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("counts", [(1, 1), (2, 0), (0, 2), (2, 2)])
def test_controlnet_residuals(counts: tuple[int, int], repeat: bool) -> None:
    dense = dense_model(num_layers=3, num_single_layers=3)
    values: dict[str, object] = dict(inputs(dense, 2))
    generator = torch.Generator().manual_seed(2)
    samples = [[torch.randn(2, 35, 128, generator=generator) for _ in range(n)] or None for n in counts]
    values |= {
        "controlnet_block_samples": samples[0],
        "controlnet_single_block_samples": samples[1],
        "controlnet_blocks_repeat": repeat,
    }
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    expected = run(dense, values)
    assert relative_error(run(fused, values), expected) < 2e-6
    assert relative_error(run(fused, inputs(dense, 2)), expected) > 1e-2


def test_attention_mask_hides_tokens() -> None:
    dense = dense_model()
    values = inputs(dense, 2)
    mask = torch.ones(2, 13 + 35, dtype=torch.bool)
    mask[:, 4:13] = False
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    masked = run(fused, {**values, "joint_attention_kwargs": {"attention_mask": mask, "scale": 1.0}})
    values["encoder_hidden_states"] = values["encoder_hidden_states"][:, :4]
    values["txt_ids"] = values["txt_ids"][:4]
    assert relative_error(masked, run(dense, values)) < 2e-6


def test_a_batch_equals_its_samples() -> None:
    dense = dense_model()
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    values = inputs(dense, 3)
    whole = run(fused, values)
    for i in range(3):
        single = {k: v if k.endswith("ids") else v[i : i + 1] for k, v in values.items()}
        assert relative_error(run(fused, single), whole[i : i + 1]) < 2e-6


def test_three_dimensional_ids_and_one_timestep_for_all() -> None:
    dense = dense_model()
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    values = inputs(dense, 2)
    values["timestep"] = values["timestep"][:1].expand(2)
    expected = run(fused, values)
    values["timestep"] = values["timestep"][:1]
    values["img_ids"], values["txt_ids"] = values["img_ids"][None], values["txt_ids"][None]
    assert torch.equal(run(fused, values), expected)


def test_output_object_and_tuple_agree() -> None:
    fused = SVDQFluxTransformer2DModel.from_dense(dense_model(), recipe=None)
    values = inputs(fused)
    with torch.no_grad():
        assert torch.equal(fused(**values).sample, fused(**values, return_dict=False)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_states": torch.zeros(1, 35, 64)}, r"hidden_states: expected shape \(1, 35, 128\)"),
        ({"encoder_hidden_states": torch.zeros(2, 13, 32)}, r"encoder_hidden_states: expected shape \(1, 13, 32\)"),
        ({"img_ids": torch.zeros(36, 3)}, r"img_ids: expected shape \(35, 3\), got \(36, 3\)"),
        ({"timestep": torch.zeros(2)}, r"timestep: expected shape \(1,\), got \(2,\)"),
        ({"hidden_states": torch.zeros(35)}, r"hidden_states: expected \(batch, tokens, channels\) .* got \(35,\)"),
        (
            {"hidden_states": torch.zeros(1, 0, 128), "img_ids": torch.zeros(0, 3)},
            "hidden_states: .* one token at least",
        ),
        (
            {"encoder_hidden_states": torch.zeros(1, 0, 32), "txt_ids": torch.zeros(0, 3)},
            "encoder_hidden_states: .* one",
        ),
        ({"controlnet_block_samples": []}, "controlnet_block_samples is empty; give None"),
        ({"guidance": None}, "the transformer needs guidance"),
        ({"pooled_projections": None, "txt_ids": None}, "the transformer needs pooled_projections, txt_ids"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, object], message: str) -> None:
    fused = SVDQFluxTransformer2DModel.from_dense(dense_model(), recipe=None)
    with pytest.raises(FormatError, match=message):
        run(fused, {**inputs(fused), **change})


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 47), r"expected shape \(1, 48\) or what broadcasts to \(1, 2, 48, 48\), got \(1, 47\)"),
        (torch.ones(2, 48), r"got \(2, 48\)"),
        (torch.ones(1, 3, 48, 48), r"got \(1, 3, 48, 48\)"),
        (torch.ones(1, 1, 1, 48, 48), r"got \(1, 1, 1, 48, 48\)"),
        (torch.ones(48, 48, dtype=torch.long)[None], "expected torch.bool, torch.float32 .* got torch.int64 on cpu"),
        (torch.ones(1, 48, device="meta"), "on cpu, got torch.bool on meta"),
    ],
)
def test_a_mask_that_does_not_fit_is_named(mask: torch.Tensor, message: str) -> None:
    fused = SVDQFluxTransformer2DModel.from_dense(dense_model(), recipe=None)
    with pytest.raises(FormatError, match=f"attention_mask: .*{message}"):
        run(fused, {**inputs(fused), "joint_attention_kwargs": {"attention_mask": mask}})


def test_masks_of_every_form_agree() -> None:
    fused = SVDQFluxTransformer2DModel.from_dense(dense_model(), recipe=None)
    values = inputs(fused, 2)
    mask = torch.ones(2, 48)
    mask[:, 4:13] = 0
    attends = mask.bool()[:, None, None]
    added = torch.zeros(2, 1, 1, 48).masked_fill(~attends, float("-inf"))
    expected = run(fused, {**values, "joint_attention_kwargs": {"attention_mask": mask}})
    for form in (attends, attends.expand(2, 2, 48, 48), added):
        found = run(fused, {**values, "joint_attention_kwargs": {"attention_mask": form}})
        assert relative_error(found, expected) < 1e-6


def test_no_image_and_one_token() -> None:
    dense = dense_model()
    fused = SVDQFluxTransformer2DModel.from_dense(dense, recipe=None)
    values = inputs(dense, image=(1, 1), text=1)
    assert relative_error(run(fused, values), run(dense, values)) < 2e-6
    none = {name: value if name.endswith("ids") else value[:0] for name, value in values.items()}
    assert run(fused, none).shape == (0, 1, 64)


def test_what_is_not_supported_says_so() -> None:
    fused = SVDQFluxTransformer2DModel.from_dense(dense_model(**VARIANTS["schnell"]), recipe=None)
    values = inputs(fused)
    with pytest.raises(UnsupportedError, match="ip_adapter_image_embeds not supported"):
        run(fused, {**values, "joint_attention_kwargs": {"ip_adapter_image_embeds": []}})
    with pytest.raises(FormatError, match="no guidance embedding"):
        run(fused, {**values, "guidance": torch.ones(1)})
    with pytest.raises(UnsupportedError, match="16-bit weights: save the Diffusers transformer"):
        fused.save_pretrained("nowhere")
    for method in ("load_lora_adapter", "add_adapter", "from_single_file", "set_attention_backend"):
        with pytest.raises(UnsupportedError):
            getattr(fused, method)("something")


def test_attention_is_chosen_for_the_model() -> None:
    fused = SVDQFluxTransformer2DModel.from_dense(dense_model(), recipe=None)
    values = inputs(fused)
    expected = run(fused, values)
    with pytest.raises(UnsupportedError, match="attention='fp16' is unknown"):
        fused.set_attention("fp16")
    assert fused.set_attention("fp8") is fused
    with pytest.raises(UnsupportedError, match="attention='fp8' does not run on cpu"):
        run(fused, values)
    with pytest.raises(UnsupportedError, match="attention='fp8' does not run on cpu"):
        run(copy.deepcopy(fused), values)
    assert torch.equal(run(fused.set_attention("sdpa"), values), expected)
