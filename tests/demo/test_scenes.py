"""Scenes, renderings and captions of the demo model's data."""

import numpy as np
import pytest
import torch

from captions import captions, full_captions
from render import TARGET_HEIGHT, control_image, render
from scenes import COLORS, FOOTPRINT, HELD_OUT, MAX_OBJECTS, SHAPES, has_held_out, sample_scenes


def test_scenes_repeat_and_do_not_depend_on_their_number():
    few, many = sample_scenes(5, 10), sample_scenes(5, 300)
    for name, value in vars(few).items():
        assert torch.equal(value, getattr(many, name)[:10]), name
    assert not torch.equal(few.position, sample_scenes(6, 10).position)


def test_rendering_repeats_and_does_not_depend_on_the_batch():
    scenes = sample_scenes(5, 4)
    together, alone = render(scenes, 48), render(scenes[2:3], 48)
    assert torch.equal(together.rgb, render(scenes, 48).rgb)
    assert torch.equal(together.mask[2], alone.mask[0])
    torch.testing.assert_close(together.depth[2], alone.depth[0])


def test_objects_do_not_overlap_and_are_sorted():
    scenes = sample_scenes(1, 2000)
    present = torch.arange(MAX_OBJECTS)[None] < scenes.count[:, None]
    foot = torch.tensor(FOOTPRINT)[scenes.shape] * scenes.scale
    distance = (scenes.position[:, :, None] - scenes.position[:, None]).norm(dim=-1)
    both = present[:, :, None] & present[:, None] & ~torch.eye(MAX_OBJECTS, dtype=torch.bool)
    assert (distance - foot[:, :, None] - foot[:, None])[both].min() > 0
    assert (scenes.position[..., 0].diff(dim=1)[present[:, 1:]] > 0.5).all()


def one_object(shape: str, scale: float = 0.6):
    scene = sample_scenes(0, 1)
    scene.count[:] = 1
    scene.shape[:] = SHAPES.index(shape)
    scene.scale[:] = scale
    scene.position[:] = 0
    scene.wall_y[:] = 6.0
    return scene


def test_depth_of_a_sphere_is_exact():
    """The ray through the sphere's center meets it one radius before the center."""
    scale = 0.6
    scene = one_object("sphere", scale)
    scene.elevation[:] = 0.0  # the eye is at height TARGET_HEIGHT and looks along y
    scene.scale[:] = TARGET_HEIGHT  # so that the center of the sphere is at the height of the eye
    depth = render(scene, 65, samples=1).depth[0]
    assert depth[32, 32].item() == pytest.approx(scene.distance.item() - TARGET_HEIGHT, abs=1e-5)
    assert depth[0, 32].item() == pytest.approx(scene.distance.item() + 6.0, abs=1e-5)  # the wall


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_lies_within_its_bounds(shape):
    rendering = render(one_object(shape), 96, samples=1)
    hit = rendering.mask[0] == 1
    assert 60 < hit.sum() < 3000
    control = control_image(rendering.depth)
    assert control.min() == 0 and control.max() == 255


def test_masks_agree_with_counts():
    scenes = sample_scenes(7, 24)
    mask = render(scenes, 64, samples=1).mask
    for i, count in enumerate(scenes.count.tolist()):
        visible = set(mask[i].unique().tolist()) - {0}
        assert visible <= set(range(1, count + 1))
        assert len(visible) >= count - 1  # at most one may be hidden behind the others


def test_held_out_pairs():
    train, held_out = sample_scenes(1, 5000), sample_scenes(1, 500, held_out="alternate")
    assert not has_held_out(train).any()
    assert has_held_out(held_out)[1::2].any(1).all() and not has_held_out(held_out)[0::2].any()
    assert {shape for _, shape in HELD_OUT} == set(SHAPES)
    texts = "\n".join(captions(train, 0)).lower()
    for color, shape in HELD_OUT:
        for material in ("", "matte ", "glossy ", "metallic "):
            assert f"{color} {material}{shape}" not in texts
    with pytest.raises(ValueError, match="held_out"):
        sample_scenes(1, 1, held_out="always")


def test_captions_name_every_object():
    scenes = sample_scenes(3, 400)
    for texts in (captions(scenes, 0), captions(scenes, 1), full_captions(scenes)):
        assert len(texts) == 400
        for i, text in enumerate(texts):
            words = text.lower().replace(",", " ").replace(".", " ").split()
            for shape in SHAPES:
                count = int(scenes.count[i])
                assert words.count(shape) == (scenes.shape[i, :count] == SHAPES.index(shape)).sum()
            for color in scenes.color[i, : scenes.count[i]].tolist():
                assert COLORS[color] in words


def test_control_image_is_near_white():
    depth = torch.from_numpy(np.array([[[1.0, 2.0], [4.0, 4.0]]], dtype=np.float32))
    assert control_image(depth).tolist() == [[[255, 85], [0, 0]]]
