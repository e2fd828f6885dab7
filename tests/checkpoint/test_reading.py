"""What is read from untrusted folders: regular files alone, JSON of bounded size, values that can be computed with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tonfa.checkpoint.reading import MOST_JSON, check_regular, exists, present, read_json
from tonfa.checkpoint.values import check_values, flaws
from tonfa.errors import CheckpointError, FormatError


def test_links_are_followed_and_those_that_lead_nowhere_named(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "x.json").symlink_to("blob")
    assert read_json(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "blob").unlink()
    assert present(tmp_path / "x.json") and not exists(tmp_path / "x.json")
    with pytest.raises(CheckpointError, match=r"x\.json: is a link to blob, which does not exist"):
        read_json(tmp_path / "x.json")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop: cannot be read: .*symbolic links"):
        read_json(tmp_path / "loop")


def test_a_pipeline_in_the_place_of_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json: .* pipeline of Diffusers; give its .*transformer"):
        read_json(tmp_path / "config.json")


@pytest.mark.timeout(20)
def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name, kind in (("pipe", "device or pipe"), ("zeros", "device or pipe"), (".", "folder")):
        with pytest.raises(CheckpointError, match=f"is no file but a {kind}"):
            read_json(tmp_path / name)


@pytest.mark.parametrize("name", ["a" * 5000, "nul\0", "\ud800"])
def test_names_that_the_system_refuses(tmp_path: Path, name: str) -> None:
    assert not present(tmp_path / name) and not exists(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read|no name that a file can have"):
        check_regular(tmp_path / name)


def test_json_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}' + " " * (MOST_JSON - 8))
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": 1}' + " " * (MOST_JSON - 7))
    with pytest.raises(CheckpointError, match=r"x\.json exceeds 4194304 bytes"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands there twice"),
        ('{"a": ' + "9" * 5000 + "}", "no JSON"),
        ("\ufeff{}", "no JSON: .*BOM"),
        ("[{}]", "expected a JSON object, got list"),
    ],
)
def test_json_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"x\.json.*{message}"):
        read_json(path)
    path.write_text(text, encoding="utf-16")
    with pytest.raises(CheckpointError, match=r"x\.json is no JSON|x\.json: is no JSON"):
        read_json(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_smoothing_factors_have_to_be_divisors(dtype: torch.dtype) -> None:
    good = torch.tensor([1e-7, 1e-3, 1.0, 6e4]).to(dtype)
    check_values("a.smooth_factor", good, "x")
    for bad in (0.0, -0.0, -1.0):
        with pytest.raises(CheckpointError, match=r"x: a\.smooth_factor: 1 of 5 smoothing factors are not positive"):
            check_values("a.smooth_factor", torch.cat([good, torch.tensor([bad]).to(dtype)]), "x")
        check_values("a.bias", torch.tensor([bad]).to(dtype), "x")


def test_flaws_are_counted() -> None:
    values = torch.tensor([0.0, 1e-40, 1.0, float("nan"), float("inf"), -2.0])
    assert list(flaws("a.smooth_factor", values)) == [
        "2 of 6 values are not finite",
        "2 of 6 smoothing factors are not positive",
        "1 of 6 smoothing factors are too small to divide by",
    ]
    assert list(flaws("a.wscales", values)) == ["2 of 6 values are not finite"]
    assert list(flaws("a.qweight", torch.zeros(4, dtype=torch.uint8))) == []


def test_errors_hold_no_control_characters() -> None:
    text = "a\x1b[31m\x07\u202eb\ud800\nc é"
    assert str(CheckpointError(text)) == "a\\x1b[31m\\x07\\u202eb\\ud800\nc é"
    assert str(FormatError("plain")) == "plain"
