"""Compiled kernels on disk, shared by all processes of a user.

A file is written under another name and renamed, begins with the digest of its content, and is thrown away if that does
not fit; so readers never see a part of it. The least recently used files go when there are more than `LIMIT` bytes.
Where nothing can be written, kernels are compiled in each process, and one warning says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

LIMIT = 256 << 20
"""Bytes of compiled kernels that are kept. All kernels for one GPU take about 1 MB."""

_SUFFIX = ".kernel"
_DIGEST = hashlib.sha256().digest_size
_logger = logging.getLogger(__name__)


def directory() -> Path:
    """`TONFA_CACHE_DIR`, or the place that the platform has for caches, followed by "kernels"."""
    named = os.environ.get("TONFA_CACHE_DIR")
    if named:
        return Path(named).expanduser() / "kernels"
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "tonfa" / "kernels"


def key(*parts: str) -> str:
    """A file name for everything that the machine code depends on."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read(name: str) -> bytes | None:
    """What was written under this key; None if nothing was, or it is damaged."""
    path = directory() / (name + _SUFFIX)
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:_DIGEST], content[_DIGEST:]
    if hashlib.sha256(code).digest() != digest:
        return None
    with contextlib.suppress(OSError):  # a cache that cannot be written can still be read
        os.utime(path)
    return code


def write(name: str, code: bytes) -> None:
    """Keep `code` under this key, whole or not at all."""
    folder = directory()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(temporary).replace(folder / (name + _SUFFIX))
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        _prune(folder)
    except OSError as error:
        _warn_once(str(folder), str(error))


@lru_cache(maxsize=8)
def _warn_once(folder: str, reason: str) -> None:
    _logger.warning(
        "compiled kernels cannot be kept in %s (%s): they are compiled again in each process. Set TONFA_CACHE_DIR to a "
        "folder that can be written.",
        folder,
        reason,
    )


def _prune(folder: Path) -> None:
    """Remove what was used longest ago. Other processes may do the same at the same time."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= LIMIT:
            return
        path.unlink(missing_ok=True)
        total -= size
