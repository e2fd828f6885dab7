"""Scenes as problems of `tonfa evaluate`: their renderings score as in demo/evaluate.py."""

import torch

from evaluate import color_names, make_problems, score
from problems import main
from tonfa.evaluate.problems import read_colors, read_problems


def test_problems_are_the_scenes(tmp_path):
    main(["--count", "6", "--resolution", "64", "--calibration", "48", "--out", str(tmp_path)])
    found = read_problems(tmp_path / "prompts.json")
    scenes = make_problems(6, 64)
    assert [p.prompt for p in found] == scenes.prompts and [p.seed for p in found] == list(range(6))
    assert torch.equal(torch.stack([p.true_mask() for p in found]), scenes.truth.mask)
    assert [len(p.objects) for p in found] == scenes.scenes.count.tolist()
    table, expected = read_colors(tmp_path / "prompts.json"), color_names(64, scenes=48)
    assert score(scenes.truth.rgb, scenes, table) == score(scenes.truth.rgb, scenes, expected)
    torch.testing.assert_close(table.features, expected.features, atol=1e-3, rtol=0)
