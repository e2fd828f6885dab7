"""Files and folders appear whole or not at all, and nothing foreign is overwritten."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tonfa.checkpoint import atomic
from tonfa.checkpoint.atomic import check_output, new_folder, publish, replacing, write_json
from tonfa.errors import CheckpointError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replaces_a_file_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stop_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), replacing(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EIO, "cannot be")]
)
def test_errors_of_the_disk_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "fsync", fail)
    with pytest.raises(CheckpointError, match=f"file: {message}"), replacing(tmp_path / "file") as file:
        file.write(b"x")
    assert names(tmp_path) == []


def test_a_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.file: cannot be written: No such file"):
        write_json(tmp_path / "nowhere" / "file", {})


def test_json_is_indented(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1]})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    1\n  ]\n}\n'


def test_new_folder_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with new_folder(out, overwrite=False) as folder:
        (folder / "config.json").write_text("{}")
        assert not out.exists()
    assert names(out) == ["config.json"]
    assert names(out.parent) == ["out"]


def test_new_folder_takes_the_place_of_an_empty_one(tmp_path: Path) -> None:
    with new_folder(tmp_path, overwrite=False) as folder:
        (folder / "config.json").write_text("{}")
    assert names(tmp_path) == ["config.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_stopped_new_folder_vanishes_and_the_old_one_stays(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(error), new_folder(out, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        raise error
    assert names(tmp_path) == ["out"]
    assert (out / "config.json").read_text() == "old"


def test_a_failed_rename_restores_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(CheckpointError, match="cannot be written"):
        publish(tmp_path / "missing", out)
    assert names(tmp_path) == ["out"]
    assert (out / "config.json").read_text() == "old"


@pytest.mark.parametrize("name", ["photo.png", "model.bin", ".hidden"])
def test_foreign_files_are_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"holds '{name}', which is no part of a checkpoint"):
        check_output(tmp_path, overwrite=True)


def test_foreign_folders_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="no part of a checkpoint"):
        check_output(tmp_path, overwrite=True)


def test_a_file_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        check_output(tmp_path / "out", overwrite=True)


def test_a_full_folder_needs_to_be_allowed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        check_output(tmp_path, overwrite=False)
    check_output(tmp_path, overwrite=True)


@pytest.mark.parametrize("there", ["empty", "full", "nothing"])
def test_what_a_link_leads_to_is_replaced_and_the_link_stays(tmp_path: Path, there: str) -> None:
    link, out = tmp_path / "link", tmp_path / "disk" / "out"
    out.parent.mkdir()
    link.symlink_to(out)
    if there != "nothing":
        out.mkdir()
    if there == "full":
        (out / "config.json").write_text("old")
    with new_folder(link, overwrite=True) as folder:
        assert folder.parent == out.parent.resolve()  # on the same disk as what it becomes
        (folder / "config.json").write_text("new")
    assert link.is_symlink() and (link / "config.json").read_text() == "new"
    assert names(tmp_path) == ["disk", "link"] and names(out.parent) == ["out"]


@pytest.mark.parametrize("name", [".", "", "../here", "../link"])
def test_the_current_folder_is_not_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to("here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="is the current folder, which cannot be replaced; name a folder in it"):
        check_output(Path(name), overwrite=True)


def test_a_mounted_disk_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.os.path, "ismount", lambda path: path == tmp_path)
    with pytest.raises(CheckpointError, match="a disk is mounted there.*name a folder in it"):
        check_output(tmp_path, overwrite=True)


def test_a_folder_named_from_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "deep")
    with pytest.raises(CheckpointError, match=r"\.\.: holds 'deep', which is no part"):
        check_output(Path(".."), overwrite=True)
