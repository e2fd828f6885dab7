"""Opening what a checkpoint names without trusting it: regular files alone, and JSON of bounded size and depth."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from tonfa.errors import CheckpointError

MOST_JSON = 2**22
"""Bytes of JSON. The index of FLUX's 2,604 tensors has 0.3 MB; JSON of nothing but `[]` takes 20 times as much."""


def local_path(source: str | Path) -> Path:
    """`source` as a path, with `~` for the home folder."""
    try:
        return Path(source).expanduser()
    except RuntimeError:  # ~name without such a user
        return Path(source)


def present(path: Path) -> bool:
    """Whether there is such an entry, be it a link that leads nowhere: opening it then says so."""
    try:
        path.lstat()
    except (OSError, ValueError):
        return False
    return True


def exists(path: Path) -> bool:
    """`Path.exists` that is False also for names that the system refuses, such as those that are too long."""
    try:
        path.stat()
    except (OSError, ValueError):
        return False
    return True


def check_regular(path: Path) -> None:
    """Raise CheckpointError unless `path` is a regular file or a link to one: reading a pipe or device may not end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        reason = f"is a link to {path.readlink()}, which does not exist" if present(path) else "no such file"
        if path.name == "config.json" and exists(path.with_name("model_index.json")):
            reason = (
                f"no such file, for this is a whole pipeline of Diffusers; give its {path.with_name('transformer')}"
            )
        raise CheckpointError(f"{path}: {reason}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # NUL or a lone surrogate in the name
        raise CheckpointError(f"{path}: is no name that a file can have") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{path}: is no file but a {'folder' if stat.S_ISDIR(mode) else 'device or pipe'}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"{name!r} stands there twice")
        content[name] = value
    return content


def _check_length(length: int, what: str) -> None:
    if length > MOST_JSON:
        raise CheckpointError(f"{what} exceeds {MOST_JSON} bytes, so it is no configuration and no index")


def parse_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object in `text`, which errors call `what`. Raises CheckpointError for anything else."""
    _check_length(len(text), what)
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise CheckpointError(f"{what} is no JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{what} is nested too deeply to be a configuration or an index") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what}: expected a JSON object, got {type(content).__name__}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError if the file is missing, too large or holds anything else."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(MOST_JSON + 1)
        _check_length(len(content), str(path))
        text = content.decode()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from error
    return parse_object(text, str(path))
