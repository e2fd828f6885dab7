"""Finding a model: local folders, Hub snapshots without a network, and clear reasons for failures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import errors

from tonfa.checkpoint import files
from tonfa.errors import CheckpointError


def test_local_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert files.resolve(tmp_path) == tmp_path
    assert files.resolve(str(tmp_path), subfolder="org/name") == tmp_path / "org" / "name"
    monkeypatch.chdir(tmp_path)
    assert files.resolve("org/name") == Path("org/name")


@pytest.mark.parametrize("source", ["nowhere", "/no/where", "./org/name", "../name", "a/b/c"])
def test_a_path_that_does_not_exist_is_named(source: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder; expected a local folder or a Hub id"):
        files.resolve(source)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; expected the folder"):
        files.resolve(tmp_path / "x.safetensors")


def test_a_hub_id_without_network_and_cache(tmp_path: Path) -> None:
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(
            CheckpointError, match=r"org/name: there is no such local folder, the Hub cannot be reached"
        ):
            files.resolve("org/name", cache_dir=tmp_path, **options)


def test_a_snapshot_in_the_cache_is_found(tmp_path: Path) -> None:
    repository, commit = tmp_path / "models--org--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    (snapshot / "transformer").mkdir(parents=True)
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    assert files.resolve("org/name", **options) == snapshot
    assert files.resolve("org/name", subfolder="transformer", **options) == snapshot / "transformer"
    with pytest.raises(CheckpointError, match="vae: no such folder"):
        files.resolve("org/name", subfolder="vae", **options)


def test_only_one_folder_of_a_repository_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo_id: str, **options: Any) -> str:
        asked.update(options, repo_id=repo_id)
        (tmp_path / "transformer").mkdir(exist_ok=True)
        return str(tmp_path)

    monkeypatch.setattr(files, "snapshot_download", download)
    files.resolve("org/name", subfolder="transformer", revision="v1", token="t", cache_dir=tmp_path)
    assert (asked["repo_id"], asked["revision"], asked["token"], asked["cache_dir"]) == (
        "org/name",
        "v1",
        "t",
        tmp_path,
    )
    assert all(pattern.startswith("transformer/") for pattern in asked["allow_patterns"])
    assert "transformer/config.json" in asked["allow_patterns"]


class Response:
    """What the Hub's errors read of an HTTP response."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.GatedRepoError, "accept its license"),
        (errors.RepositoryNotFoundError, "neither such a local folder nor such a Hub repository"),
        (errors.RevisionNotFoundError, "no revision 'v1'"),
        (errors.HfHubHTTPError, "the download failed: reason"),
    ],
)
def test_errors_of_the_hub_are_explained(
    monkeypatch: pytest.MonkeyPatch, error: type[errors.HfHubHTTPError], message: str
) -> None:
    def fail(*arguments: object, **options: object) -> str:
        raise error("reason", response=Response())

    monkeypatch.setattr(files, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=f"org/name: .*{message}"):
        files.resolve("org/name", revision="v1")


def test_broken_connections_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> str:
        raise errors.HfHubHTTPError.__bases__[0]("connection reset")

    monkeypatch.setattr(files, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="the download failed: connection reset"):
        files.resolve("org/name")


@pytest.mark.parametrize("source", ["a" * 5000, "~nobody-of-this-name/x", "nul\0", "org/name/nul\0.safetensors"])
def test_names_that_the_system_refuses(source: str) -> None:
    with pytest.raises(CheckpointError, match="no such|neither|cannot be reached|download failed"):
        files.resolve(source)
    with pytest.raises(CheckpointError, match="no such|neither|cannot be reached|download failed"):
        files.resolve_file(source)
