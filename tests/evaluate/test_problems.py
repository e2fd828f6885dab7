"""Files of problems: what they may say, and how every mistake in them is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tonfa.errors import CheckpointError, TonfaError
from tonfa.evaluate.problems import Problem, read_colors, read_problems


def test_a_prompt_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  two dogs \n")
    assert read_problems(file) == [Problem("a cat", 0), Problem("two dogs", 1)]
    more = read_problems(file, samples=5, seed=10)
    assert [p.prompt for p in more] == ["a cat", "two dogs", "a cat", "two dogs", "a cat"]
    assert [p.seed for p in more] == [10, 11, 12, 13, 14]
    assert read_problems(file, samples=1) == [Problem("a cat", 0)]
    file.write_text("a cat\n", encoding="utf-8-sig")
    assert read_problems(file) == [Problem("a cat", 0)]


def test_control_images_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    folder = tmp_path / "depth"
    folder.mkdir()
    for name in ("2.png", "1.jpg"):
        Image.new("L", (16, 16)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    found = read_problems(tmp_path / "prompts.txt", control_images=folder)
    assert [p.control and p.control.name for p in found] == ["1.jpg", "2.png"]
    with pytest.raises(CheckpointError, match="holds 2 pictures for 1 prompts"):
        (tmp_path / "one.txt").write_text("a")
        read_problems(tmp_path / "one.txt", control_images=folder)
    with pytest.raises(CheckpointError, match="--control-images: no folder"):
        read_problems(tmp_path / "prompts.txt", control_images=tmp_path / "nowhere")


def test_the_demo_s_own_file() -> None:
    found = read_problems(Path(__file__).parents[2] / "demo" / "inputs" / "prompts.json")
    assert [p.seed for p in found] == [0, 1, 2, 3] and all(p.control is not None for p in found)


def test_masks_and_objects(tmp_path: Path) -> None:
    Image.new("L", (16, 16), 1).save(tmp_path / "mask.png")
    row = {"prompt": "a", "seed": 7, "mask": "mask.png", "objects": ["red"]}
    (tmp_path / "p.json").write_text(json.dumps([row, {"prompt": "b"}]))
    first, second = read_problems(tmp_path / "p.json", seed=100)
    assert (first.seed, first.objects, second) == (7, ("red",), Problem("b", 101))
    mask = first.true_mask()
    assert mask is not None and mask.shape == (16, 16) and (mask == 1).all() and second.true_mask() is None
    with pytest.raises(CheckpointError, match=r"no .*colors\.json that knows colors"):
        read_colors(tmp_path / "p.json")
    table = {"names": ["red", "blue"], "features": [[53.0, 80, 67], [32, 79, -108]], "labels": [0, 1]}
    (tmp_path / "colors.json").write_text(json.dumps(table))
    assert read_colors(tmp_path / "p.json").classify(torch.tensor([[50.0, 70, 60]])).tolist() == [0]
    for wrong in ({**table, "labels": [0, 2]}, {**table, "features": [[1, 2]]}, {"names": []}):
        (tmp_path / "colors.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="holds no names, features and labels"):
            read_colors(tmp_path / "p.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ({"prompt": "a"}, "expected a JSON list"),
        ([], "holds no prompt"),
        ([{"prompt": " "}], "entry 0: expected an object with a prompt"),
        ([{"prompt": "a"}, "b"], "entry 1: expected an object with a prompt"),
        ([{"prompt": "a", "sede": 1}], "entry 0: sede unknown; known are"),
        ([{"prompt": "a", "seed": -1}], "entry 0: seed is -1"),
        ([{"prompt": "a", "seed": True}], "entry 0: seed is True"),
        ([{"prompt": "a", "control_image": 3}], "entry 0: control_image is 3, expected a file name"),
        ([{"prompt": "a", "control_image": "gone.png"}], "no file .*gone.png"),
        ([{"prompt": "a", "mask": "gone.png"}], "no file .*gone.png"),
        ([{"prompt": "a", "objects": ["red"]}], "names objects without a mask"),
        ([{"prompt": "a", "mask": "m", "objects": "red"}], "expected a list of color names"),
    ],
)
def test_mistakes(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "p.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(TonfaError, match=message):
        read_problems(file)


def test_no_file_no_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--prompts: no file"):
        read_problems(tmp_path / "gone.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(CheckpointError, match="holds no prompt"):
        read_problems(tmp_path / "empty.txt")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(CheckpointError, match="is no UTF-8 text"):
        read_problems(tmp_path / "binary.txt")
