"""The folder `<out>.partial` in which a checkpoint grows: finished shards, and a manifest to resume from.

The manifest holds a fingerprint of everything that decides the output and, for each finished shard, the errors of its
linears. A shard is entered after its file has been written, synced and renamed, so that a run that was stopped at any
moment goes on with the first shard that is not entered. A calibration keeps its samples there too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tonfa.checkpoint.atomic import check_output, explained, publish, write_json
from tonfa.checkpoint.reading import read_json
from tonfa.checkpoint.shards import write_index
from tonfa.checkpoint.strict import Spec
from tonfa.checkpoint.tensors import file_spec, open_file
from tonfa.errors import CheckpointError

_MANIFEST = "manifest.json"
_CONTENT = "checkpoint"
_SAMPLES = "samples"


class Workspace:
    """A checkpoint under way to the folder `out`."""

    def __init__(self, out: Path, fingerprint: Mapping[str, Any], overwrite: bool) -> None:
        """Open or create the folder.

        Raises CheckpointError if `out` may not be replaced, or if another run was left behind and may not either.
        """
        check_output(out, overwrite)
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.content, self.samples = self.folder / _CONTENT, self.folder / _SAMPLES
        self._fingerprint = dict(fingerprint)
        self._errors: dict[str, dict[str, float]] = {}
        self._resume(overwrite)
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self.content.mkdir(exist_ok=True)

    def _resume(self, overwrite: bool) -> None:
        if not self.folder.exists():
            return
        manifest = self.folder / _MANIFEST
        found = read_json(manifest) if manifest.exists() else {}
        before, errors = found.get("fingerprint"), found.get("errors")
        if not isinstance(before, dict) or not isinstance(errors, dict):
            if any(self.folder.glob("*")):
                raise CheckpointError(f"{self.folder}: is in the way and is no unfinished checkpoint; remove it")
        elif before == self._fingerprint:
            self._errors = errors
        elif overwrite or not (errors or self.samples.exists()):
            shutil.rmtree(self.folder)
        else:
            changed = ", ".join(key for key, value in self._fingerprint.items() if before.get(key) != value)
            raise CheckpointError(
                f"{self.folder}: an unfinished run with another {changed} is there; repeat that one to finish it, "
                "or discard it by asking to overwrite or by removing the folder"
            )

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
