"""The folder `<out>.partial` in which a checkpoint grows: finished shards, and a manifest to resume from.

The manifest holds a fingerprint of everything that decides the output and, for each finished shard, the errors of its
linears. A shard is entered after its file has been written, synced and renamed, so that a run that was stopped at any
moment goes on with the first shard that is not entered. A calibration keeps its samples there too.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tonfa.checkpoint.atomic import check_output, destination, explained, publish, write_json
from tonfa.checkpoint.reading import read_json
from tonfa.checkpoint.shards import write_index
from tonfa.checkpoint.strict import Spec
from tonfa.checkpoint.tensors import file_spec, open_file
from tonfa.errors import CheckpointError

if sys.platform != "win32":
    import fcntl

_MANIFEST = "manifest.json"
_CONTENT = "checkpoint"
_SAMPLES = "samples"


def unfinished(out: Path) -> Path:
    """The folder in which a checkpoint to the folder `out` grows."""
    out = destination(out)
    return out.with_name(out.name + ".partial")


class Workspace:
    """A checkpoint under way to the folder `out`, locked for one process while its context is open."""

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], overwrite: bool) -> None:
        """Open or create the folder.

        Raises CheckpointError if `out` may not be replaced, if another run was left behind and may not either, and if
        one is going on.
        """
        check_output(out, overwrite)
        self.out = destination(out)
        self.folder = unfinished(out)
        self.content, self.samples = self.folder / _CONTENT, self.folder / _SAMPLES
        self._fingerprint = dict(fingerprint)
        self._errors: dict[str, dict[str, float]] = {}
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.folder)
            try:
                self._resume(overwrite)
                self._write()
                self.content.mkdir(exist_ok=True)
            except BaseException:
                self._unlock()
                raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _resume(self, overwrite: bool) -> None:
        manifest = self.folder / _MANIFEST
        found = read_json(manifest) if manifest.exists() else {}
        before, errors = found.get("fingerprint"), found.get("errors")
        if not isinstance(before, dict) or not isinstance(errors, dict):
            if any(self.folder.glob("*")):
                raise CheckpointError(f"{self.folder}: is in the way and is no unfinished checkpoint; remove it")
        elif before == self._fingerprint:
            self._errors = errors
        elif overwrite or not (errors or self.samples.exists()):
            self._empty()
        else:
            changed = ", ".join(key for key, value in self._fingerprint.items() if before.get(key) != value)
            raise CheckpointError(
                f"{self.folder}: an unfinished run with another {changed} is there; repeat that one to finish it, "
                "or discard it by asking to overwrite or by removing the folder"
            )

    def _empty(self) -> None:
        """Remove what is in the folder, which stays, and with it the lock."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _write(self) -> None:
        write_json(self.folder / _MANIFEST, {"fingerprint": self._fingerprint, "errors": self._errors})

    def finished(self, shard: str, spec: Spec) -> dict[str, float] | None:
        """The errors of a shard's linears if an earlier run has written it whole, else None."""
        path = self.content / shard
        try:
            whole = shard in self._errors and file_spec(path, open_file(path)) == spec
        except CheckpointError:
            whole = False
        return self._errors[shard] if whole else None

    def enter(self, shard: str, errors: Mapping[str, float]) -> None:
        """Note that a shard's file is complete."""
        self._errors[shard] = dict(errors)
        self._write()

    def publish(self, config: Mapping[str, Any], shards: Mapping[str, Spec]) -> None:
        """Add index and configuration and rename the whole to `out`."""
        write_index(self.content, shards)
        write_json(self.content / "config.json", config)
        publish(self.content, self.out)
        shutil.rmtree(self.folder)


def _locked(folder: Path) -> int | None:
    """A descriptor that locks the folder until it is closed or the process ends; None where nothing can be locked."""
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CheckpointError(
            f"{folder}: another run is at work in it; wait for it, or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor
