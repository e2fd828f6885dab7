"""Models named on the command line: a folder, or an id on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tonfa.errors import CheckpointError


def read_json(source: str, name: str, what: str) -> dict[str, Any] | None:
    """The content of `name` in a folder or a Hub repository, without its other files; None where there is none."""
    from tonfa.checkpoint import reading

    local = reading.local_path(source)
    if reading.exists(local) and local.is_dir():
        return reading.read_json(local / name) if (local / name).is_file() else None
    if reading.exists(local):
        raise CheckpointError(f"{what}: {source} is a file; expected a folder or a Hub id such as org/name")
    file = _download(source, name, what)
    return None if file is None else reading.read_json(file)


def _download(source: str, name: str, what: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except HFValidationError:
        raise CheckpointError(f"{what}: there is no folder {source}, and a Hub id has the form org/name") from None
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{what}: there is no folder {source}, the Hub cannot be reached, and its cache does not hold {name}"
        ) from error
    except EntryNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{what}: {source} cannot be read from the Hub: {error}") from error
