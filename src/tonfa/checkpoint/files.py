"""Finding a checkpoint: a local folder, or a repository of the Hugging Face Hub brought into the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tonfa.checkpoint.reading import exists, local_path
from tonfa.errors import CheckpointError

_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Broken connections: an error of the Hub client's HTTP library, whichever this version uses."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATTERNS = (
    "config.json",
    "diffusion_pytorch_model*",
    "model*.safetensors",
    "model*.safetensors.index*.json",
    "transformer_blocks.safetensors",
    "unquantized_layers.safetensors",
)


def _reason(error: Exception, revision: str | None) -> str:
    """What a failed download means for the user."""
    if isinstance(error, GatedRepoError):
        return "access to it is restricted; accept its license on huggingface.co and log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is neither such a local folder nor such a Hub repository; a private one needs a token"
    if isinstance(error, RevisionNotFoundError):
        return f"the Hub repository has no revision {revision!r}"
    if isinstance(error, LocalEntryNotFoundError):
        return "there is no such local folder, the Hub cannot be reached, and the local cache does not hold it"
    return f"the download failed: {error}"


def resolve(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a model: `source` itself, or the snapshot of a Hub repository such as `org/name`.

    Of a repository only the configuration and the safetensors of the one folder are downloaded. Raises
    CheckpointError if there is no such folder or repository, or if it cannot be fetched.
    """
    local = local_path(source)
    if not exists(local) and isinstance(source, str) and _HUB_ID.fullmatch(source):
        prefix = "" if subfolder is None else f"{subfolder.strip('/')}/"
        try:
            snapshot = snapshot_download(
                source,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=[prefix + pattern for pattern in _PATTERNS],
                ignore_patterns=["*.bin", "*.bin.index*"],
            )
        except (OSError, ValueError, _HTTP_ERROR) as error:
            raise CheckpointError(f"{source}: {_reason(error, revision)}") from error
        local = Path(snapshot)
    folder = local if subfolder is None else local / subfolder
    if not exists(folder):
        raise CheckpointError(f"{folder}: no such folder; expected a local folder or a Hub id such as org/name")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; expected the folder that holds config.json and the weights")
    return folder


def resolve_file(
    source: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """A local file: `source` itself, or `org/name/path/file.safetensors` brought from the Hub.

    Raises CheckpointError if there is no such file or repository, or if it cannot be fetched.
    """
    local = local_path(source)
    if exists(local):
        return local
    parts = str(source).split("/")
    repository, name = "/".join(parts[:2]), "/".join(parts[2:])
    if not isinstance(source, str) or not name or not _HUB_ID.fullmatch(repository):
        raise CheckpointError(f"{source}: no such file; expected a local file or a Hub file such as org/name/file")
    try:
        found = hf_hub_download(
            repository,
            name,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    except (OSError, ValueError, _HTTP_ERROR) as error:
        raise CheckpointError(f"{source}: {_reason(error, revision)}") from error
    return Path(found)
