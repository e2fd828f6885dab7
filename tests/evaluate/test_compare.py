"""Whole comparisons of a tiny pipeline: with itself, with its 4-bit form, with damaged ones, and by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support import relative_error
from tonfa import SVDQFluxTransformer2DModel
from tonfa.errors import CheckpointError, FormatError
from tonfa.evaluate.adherence import ColorTable, lab
from tonfa.evaluate.compare import Evaluation
from tonfa.evaluate.drawing import Settings, control_image, draw
from tonfa.evaluate.layers import LayerInputs, layer_errors
from tonfa.evaluate.problems import Problem
from tonfa.evaluate.similarity import psnr, to_unit
from tonfa.evaluate.trajectory import recorded, velocity_errors
from tonfa.models.flux.plan import flux_dims, flux_plan
from tonfa.quantizer.recipe import Recipe

SETTINGS = Settings(height=32, width=48, steps=3, guidance=4.0, max_sequence_length=16, batch_size=2)


@pytest.fixture
def problems(depth_maps: list[Path]) -> list[Problem]:
    return [
        Problem(prompt, seed, depth) for prompt, seed, depth in zip(("cat", "dog"), (4, 5), depth_maps, strict=True)
    ]


def damaged(transformer: Any, factor: float) -> Any:
    """One weight is scaled; all others are as they were."""
    other = copy.deepcopy(transformer)
    with torch.no_grad():
        other.transformer_blocks[0].attn.to_q.weight.mul_(factor)
        other.single_transformer_blocks[0].proj_out.weight.mul_(factor)
    return other


def test_the_reference_itself_has_no_error(pipe: Any, problems: list[Problem]) -> None:
    evaluation = Evaluation(pipe, problems, SETTINGS)
    found = evaluation.compare("itself", copy.deepcopy(pipe.transformer), pipe.transformer.state_dict())
    assert found.velocity.overall == 0 and found.velocity.by_timestep == (0, 0, 0)
    assert (found.psnr.mean, found.psnr.count, found.psnr.infinite) == (None, 0, 2)
    assert found.ssim.mean == pytest.approx(1, abs=1e-12)
    assert len(found.layers) == 15 and all(layer.weight == 0 for layer in found.layers)
    assert all(layer.output is not None and layer.output < 1e-6 for layer in found.layers)
    assert found.velocity.timesteps[0] == 1 and found.velocity.timesteps == tuple(
        sorted(found.velocity.timesteps)[::-1]
    )
    assert torch.equal(found.pictures, evaluation.pictures)
    json.dumps(found.as_dict(), allow_nan=False)


def test_more_damage_is_more_error(pipe: Any, problems: list[Problem]) -> None:
    evaluation = Evaluation(pipe, problems, SETTINGS)
    reference = copy.deepcopy(pipe.transformer)
    calls: list[int] = []
    quantized = SVDQFluxTransformer2DModel.from_dense(reference, Recipe(rank=32, iterations=1), activations="int8")
    comparisons = [
        evaluation.compare(name, transformer, reference.state_dict(), lambda: calls.append(1))
        for name, transformer in (
            ("4-bit", quantized),
            ("damaged", damaged(reference, 3)),
            ("worse", damaged(reference, -10)),
        )
    ]
    errors = [c.velocity.overall for c in comparisons]
    assert 0.001 < errors[0] < 0.1 and errors[0] < errors[1] < errors[2]
    ratios = [c.psnr.mean or 0 for c in comparisons]
    assert ratios[0] > ratios[1] > ratios[2] > 0
    assert [c.ssim.mean for c in comparisons] == sorted((c.ssim.mean for c in comparisons), reverse=True)
    assert len(calls) == 3 * (2 * evaluation.steps_of_drawing() + 15)
    wrong = {layer.name for layer in comparisons[1].layers if layer.weight > 0}
    assert wrong == {
        "transformer_blocks.0.attn.to_qkv",
        "single_transformer_blocks.0.attn.to_out",
        "single_transformer_blocks.0.ff.down",
    }
    by_name = {layer.name: layer for layer in comparisons[1].layers}
    assert by_name["single_transformer_blocks.0.ff.down"].weight == pytest.approx(2, rel=1e-3)
    assert by_name["single_transformer_blocks.0.ff.down"].output == pytest.approx(2, rel=1e-3)
    assert all(0.005 < layer.weight < 0.12 for layer in comparisons[0].layers)
    assert all(layer.output is not None and 0.005 < layer.output < 0.2 for layer in comparisons[0].layers)


def test_velocity_errors_are_those_of_single_calls(pipe: Any, problems: list[Problem]) -> None:
    with recorded(pipe.transformer) as trajectory:
        draw(pipe, problems, SETTINGS)
    assert len(trajectory.calls) == 3 and trajectory.constant["encoder_hidden_states"].shape == (2, 16, 32)
    other = damaged(pipe.transformer, 2)
    errors = velocity_errors(other, trajectory, torch.device("cpu"))
    assert errors.shape == (3, 2)
    call = trajectory.calls[1]
    with torch.no_grad():
        exact = pipe.transformer(**trajectory.arguments(call, torch.device("cpu")))[0]
        found = other(**trajectory.arguments(call, torch.device("cpu")))[0]
    assert torch.equal(exact, call.velocity)
    for picture in range(2):
        assert errors[1, picture].item() == pytest.approx(relative_error(found[picture], exact[picture]), rel=1e-9)
    with recorded(pipe.transformer) as unused:
        pass
    assert not unused.calls and not pipe.transformer._forward_hooks


def test_the_overall_error_is_the_geometric_mean_over_timesteps(pipe: Any, problems: list[Problem]) -> None:
    evaluation = Evaluation(pipe, problems, SETTINGS)
    other = damaged(pipe.transformer, 2)
    errors = torch.cat([velocity_errors(other, t, torch.device("cpu")) for t in evaluation.trajectories], dim=1)
    found = evaluation.velocity(other)
    means = errors.mean(dim=1)
    assert found.by_timestep == pytest.approx(means.tolist())
    assert found.overall == pytest.approx(float(means.log().mean().exp()))
    by_picture = [float(errors[:, i].log().mean().exp()) for i in range(2)]
    assert found.by_picture == pytest.approx(by_picture)
    assert found.low == pytest.approx(min(by_picture)) and found.high == pytest.approx(max(by_picture))


def test_pictures_do_not_depend_on_their_batch(pipe: Any, problems: list[Problem]) -> None:
    pipe.to(torch.float32)
    together = draw(pipe, problems, SETTINGS)
    singles = torch.cat([draw(pipe, [problem], SETTINGS) for problem in problems])
    assert (together.int() - singles.int()).abs().max() <= 1
    assert psnr(to_unit(together[:1]), to_unit(together[1:])).item() < 40


def test_layer_inputs_are_those_of_the_layers(pipe: Any, problems: list[Problem]) -> None:
    plan = flux_plan(flux_dims(dict(pipe.transformer.config)))
    inputs = LayerInputs(plan, calls=3)
    with inputs.kept(pipe.transformer):
        draw(pipe, problems, SETTINGS)
        draw(pipe, problems, SETTINGS)  # more calls than were announced are not kept
    by_name = {linear.name: linear for linear in plan.linears()}
    shapes = {name: tuple(torch.cat(rows).shape) for name, rows in inputs.rows.items()}
    assert set(shapes) == set(by_name)
    # 2 pictures of 6 image and 16 text tokens: fewer inputs than may be kept, so all of them are.
    assert shapes["single_transformer_blocks.0.ff.down"] == (3 * 44, 512)
    assert shapes["transformer_blocks.0.attn.to_qkv"] == (3 * 12, 128)
    assert shapes["transformer_blocks.0.norm1.linear"] == (3 * 2, 128)
    errors = layer_errors(plan, pipe.transformer.state_dict(), damaged(pipe.transformer, 1.5), inputs)
    x = inputs.of(by_name["single_transformer_blocks.0.attn.to_out"])
    assert x is not None
    weight = pipe.transformer.single_transformer_blocks[0].proj_out.weight[:, :128].detach().float()
    found = next(e for e in errors if e.name == "single_transformer_blocks.0.attn.to_out")
    changed = (1.5 * weight).bfloat16().float()
    assert found.output == pytest.approx(relative_error(x.float() @ changed.T, x.float() @ weight.T), rel=1e-3)


def test_a_layer_of_zeros_has_no_relative_error(pipe: Any) -> None:
    plan = flux_plan(flux_dims(dict(pipe.transformer.config)))
    state = dict(pipe.transformer.state_dict())
    state["single_transformer_blocks.0.proj_mlp.weight"] = torch.zeros(512, 128)
    errors = {e.name: e for e in layer_errors(plan, state, pipe.transformer, None)}
    found = errors.pop("single_transformer_blocks.0.ff.up")
    assert (found.weight, found.output) == (None, None) and all(e.weight == 0 for e in errors.values())


def test_nan_names_the_candidate(pipe: Any, problems: list[Problem]) -> None:
    evaluation = Evaluation(pipe, problems[:1], replace(SETTINGS, batch_size=1), keep_inputs=False)
    with pytest.raises(FormatError, match="broken: step 1: the velocity holds NaN or Inf"):
        evaluation.compare("broken", damaged(pipe.transformer, float("nan")))


def test_adherence_of_known_scenes(pipe: Any, problems: list[Problem], tmp_path: Path) -> None:
    mask = np.zeros((32, 48), dtype=np.uint8)
    mask[4:28, 4:20] = 1
    Image.fromarray(mask).save(tmp_path / "mask.png")
    known = [replace(p, mask=tmp_path / "mask.png", objects=("drawn",)) for p in problems]
    plain = Evaluation(pipe, known, SETTINGS)
    assert plain.adherence is not None and plain.adherence.color is None
    # The median color that the first picture has inside the mask gets a name; black gets the other.
    inside = np.zeros((32, 48), dtype=bool)
    inside[5:27, 5:19] = True
    color = lab(plain.pictures[:1])[0][:, torch.from_numpy(inside)].median(1).values
    table = ColorTable(
        ("drawn", "black"), torch.stack([color] * 5 + [torch.zeros(3)] * 5), torch.tensor([0] * 5 + [1] * 5)
    )
    evaluation = Evaluation(pipe, known, SETTINGS, colors=table)
    found = evaluation.compare("itself", copy.deepcopy(pipe.transformer))
    assert found.adherence == evaluation.adherence and found.adherence is not None
    assert (found.adherence.objects, found.adherence.color and found.adherence.color.mean) == (2, 1)
    assert found.adherence.silhouette_recall is not None and found.layers == ()
    wrong = [replace(p, objects=("black",)) for p in known]
    colors = Evaluation(pipe, wrong, SETTINGS, colors=table).adherence
    assert colors is not None and colors.color is not None and colors.color.mean == 0


def test_pictures_are_read_before_any_is_drawn(
    pipe: Any, problems: list[Problem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("drawn before the problems were checked")

    monkeypatch.setattr("tonfa.evaluate.compare.draw", never)
    (tmp_path / "cut.png").write_bytes((problems[1].control or tmp_path).read_bytes()[:-60])
    with pytest.raises(CheckpointError, match=r"cut\.png: is damaged"):
        Evaluation(pipe, [problems[0], replace(problems[1], control=tmp_path / "cut.png")], SETTINGS)
    Image.fromarray(np.zeros((16, 16), dtype=np.uint8)).save(tmp_path / "small.png")
    with pytest.raises(FormatError, match=r"small\.png: is 16 x 16, the picture 48 x 32"):
        Evaluation(pipe, [replace(problems[0], mask=tmp_path / "small.png")], SETTINGS)
    (tmp_path / "half.png").write_bytes((tmp_path / "small.png").read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r"half\.png is damaged or no picture"):
        Evaluation(pipe, [replace(problems[0], mask=tmp_path / "half.png")], SETTINGS)
    Image.new("RGB", (48, 32)).save(tmp_path / "rgb.png")
    with pytest.raises(CheckpointError, match="one channel, got mode RGB"):
        Evaluation(pipe, [replace(problems[0], mask=tmp_path / "rgb.png")], SETTINGS)


def test_control_images_are_drawn_upright(tmp_path: Path) -> None:
    values = np.zeros((32, 48, 3), dtype=np.uint8)
    values[:, 24:] = 255
    turned = Image.fromarray(values).rotate(90, expand=True)
    turned.getexif()[0x0112] = 6  # to be shown a quarter turn clockwise
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    drawn = control_image(Problem("a", 0, control=tmp_path / "turned.png"), SETTINGS)
    assert drawn is not None and np.array_equal(np.asarray(drawn), values)
