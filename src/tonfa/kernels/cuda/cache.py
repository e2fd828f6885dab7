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
import stat
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

from tonfa.errors import KernelError

LIMIT = 256 << 20
"""Bytes of compiled kernels that are kept. All that `tonfa doctor --compile` builds for one GPU are about 5 MB."""

_SUFFIX, _UNFINISHED = ".kernel", ".tmp"
_DIGEST = hashlib.sha256().digest_size
_logger = logging.getLogger(__name__)


def directory() -> Path:
    """`TONFA_CACHE_DIR`, or the place that the platform has for caches, followed by "kernels".

    Users without a home folder, as in some containers, have their own one among the temporary files. Raises KernelError
    for a `TONFA_CACHE_DIR` in a home that there is not, and OSError where that folder cannot be made or is not theirs.
    """
    named = os.environ.get("TONFA_CACHE_DIR")
    if named:
        try:
            return Path(named).expanduser() / "kernels"
        except RuntimeError:
            raise KernelError(f"TONFA_CACHE_DIR={named}: there is no such home folder; give a full path") from None
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        return _of_this_user() / "kernels"
    return base / "tonfa" / "kernels"


def _of_this_user() -> Path:
    """A folder among the temporary files, made if need be, that no one else can put machine code into."""
    if sys.platform == "win32":
        raise FileNotFoundError("there is no home folder")
    user = os.geteuid()
    folder = Path(tempfile.gettempdir()) / f"tonfa-{user}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=stat.S_IRWXU)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != user or status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PermissionError(f"there is no home folder, and {folder} is not this user's alone")
    return folder


def key(*parts: str) -> str:
    """A file name for everything that the machine code depends on."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def read(name: str) -> bytes | None:
    """What was written under this key; None if nothing was, or it is damaged."""
    try:
        path = directory() / (name + _SUFFIX)
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
    place = "the folder for caches"
    try:
        folder = directory()
        place = str(folder)
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=_UNFINISHED)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            Path(temporary).replace(folder / (name + _SUFFIX))
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        _prune(folder)
    except OSError as error:
        # No names of temporary files, which are others each time: one reason is said once.
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror or str(error)
        _warn_once(place, reason)


@lru_cache(maxsize=8)
def _warn_once(place: str, reason: str) -> None:
    _logger.warning(
        "compiled kernels cannot be kept in %s (%s): they are compiled again in each process. Set TONFA_CACHE_DIR to a "
        "folder that can be written.",
        place,
        reason,
    )


def _prune(folder: Path) -> None:
    """Remove what was used longest ago, of our files alone. Other processes may do the same at the same time."""
    files = []
    for path in folder.iterdir():
        if path.suffix in (_SUFFIX, _UNFINISHED):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= LIMIT:
            return
        with contextlib.suppress(OSError):  # another process removed it, or may alone
            path.unlink()
        total -= size
