"""Writing files and folders whole or not at all: under a temporary name beside the target, synced, then renamed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from tonfa.errors import CheckpointError

_CONFIGS = ("config.json", "comfy_config.json")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's errors about writing `path` into CheckpointErrors."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise CheckpointError(f"{path}: no space left on the disk; free some or write elsewhere") from error
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system lets folders be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` if the block succeeds and vanishes if it does not."""
    temporary = path.with_name(path.name + ".tmp")
    with explained(path):
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented and with a final newline."""
    text = json.dumps(content, indent=2) + "\n"
    with replacing(path) as file:
        file.write(text.encode())


def destination(out: Path) -> Path:
    """The folder that `out` means, with a name of its own: what a link leads to, so that the link stays.

    Raises CheckpointError for folders that no other can be renamed to.
    """
    found = Path(os.path.realpath(out)) if out.is_symlink() or out.name in ("", "..") else out
    if os.path.ismount(found):
        raise CheckpointError(f"{out}: a disk is mounted there, so the folder cannot be replaced; name a folder in it")
    if found.exists() and found.samefile(os.curdir):
        raise CheckpointError(f"{out}: is the current folder, which cannot be replaced; name a folder in it")
    return found


def check_output(out: Path, overwrite: bool) -> None:
    """Raise CheckpointError unless a checkpoint may be written to the folder `out`.

    A folder that is not empty is replaced only on request, and only if it holds nothing but a checkpoint's files.
    """
    if not destination(out).exists():
        return
    if not out.is_dir():
        raise CheckpointError(f"{out}: is a file; name a folder to write to")
    entries = sorted(out.iterdir())
    if entries and not overwrite:
        raise CheckpointError(f"{out}: exists and is not empty; choose another folder or ask to overwrite it")
    for entry in entries:
        known = entry.name in _CONFIGS or entry.name.endswith((".safetensors", ".safetensors.index.json"))
        if not known or not entry.is_file():
            raise CheckpointError(f"{out}: holds {entry.name!r}, which is no part of a checkpoint; not overwriting it")


def publish(folder: Path, out: Path) -> None:
    """Rename a finished folder to the `destination` `out`, in place of what `check_output` has allowed to go."""
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    with explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            folder.replace(out)
        else:
            out.replace(old)
            try:
                folder.replace(out)
            except BaseException:
                old.replace(out)
                raise
            shutil.rmtree(old)
        _sync_folder(out.parent)


@contextmanager
def new_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder to fill that becomes `out` if the block succeeds and vanishes if it does not."""
    check_output(out, overwrite)
    out = destination(out)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with explained(out):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
