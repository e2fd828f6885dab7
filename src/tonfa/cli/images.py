"""Pictures on disk: opening them with clear errors, choosing sizes, naming and writing outputs."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tonfa.checkpoint.atomic import explained
from tonfa.checkpoint.reading import exists, present
from tonfa.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from PIL.Image import Image

MULTIPLE = 16
"""FLUX's latents are an eighth of the picture's size, and the transformer reads them in patches of 2 x 2."""

LARGEST = 16000
"""Pixels a side. WebP holds no more than 16383, and no FLUX draws anything near."""

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def open_image(path: Path, option: str) -> Image:
    """The picture upright, in RGB. Raises CheckpointError where the file is missing or no complete picture."""
    from tonfa.preprocess import open_rgb

    try:
        return open_rgb(path)
    except CheckpointError as error:
        raise CheckpointError(f"{option}: {error}") from error


def nearest_multiple(pixels: int) -> int:
    """The nearest size that the model can draw."""
    return max(MULTIPLE, (pixels + MULTIPLE // 2) // MULTIPLE * MULTIPLE)


def check_side(pixels: int | None, option: str) -> None:
    """Raise a usage error unless a picture can have this height or width."""
    if pixels is None:
        return
    if pixels > LARGEST:
        raise typer.BadParameter(f"{pixels} is too large: at most {LARGEST} pixels a side", param_hint=option)
    if pixels <= 0 or pixels % MULTIPLE:
        hint = f"; the nearest is {nearest_multiple(pixels)}" if pixels > 0 else ""
        raise typer.BadParameter(f"{pixels} is no positive multiple of {MULTIPLE}{hint}", param_hint=option)


def output_paths(output: str | Path, count: int) -> list[Path]:
    """Where `count` pictures go: the file itself, or numbered files beside it or in the folder.

    A folder exists, ends with a slash, or has no suffix; `write_image` makes it. Raises a usage error for an unknown
    kind of file, UnsupportedError for what cannot be written.
    """
    path = Path(output)
    is_folder = str(output).endswith(("/", os.sep)) or not path.suffix or (exists(path) and path.is_dir())
    if not is_folder and path.suffix.lower() not in FORMATS:
        raise typer.BadParameter(
            f"{path.name}: the name must end with one of {', '.join(FORMATS)}, or with a slash for a folder",
            param_hint="--output",
        )
    file = path / "image.png" if is_folder else path
    paths = [file] if count == 1 else [file.with_stem(f"{file.stem}-{i}") for i in range(count)]
    _check_folder(file.parent)
    for target in paths:
        _check_free(target)
    return paths


def _check_folder(folder: Path) -> None:
    """Raise UnsupportedError unless files can be made in the folder, or in the one that it would be made in."""
    while not present(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UnsupportedError(f"--output: {folder} is no folder")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UnsupportedError(f"--output: the folder {folder} cannot be written to: {reason}") from error


def _check_free(path: Path) -> None:
    """Raise UnsupportedError if no file can have this name."""
    try:
        taken = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"--output: {path} cannot be written: {getattr(error, 'strerror', error)}") from error
    if taken:
        raise UnsupportedError(f"--output: {path} is a folder, and a picture is to be written there")


def write_image(image: Image, path: Path) -> None:
    """Write under another name first, so that `path` is always a complete picture, in a folder that is made if needed.

    Raises CheckpointError, naming the file, where it cannot be written.
    """
    unfinished = path.with_name(f".tonfa-{os.getpid()}.partial")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            image.save(unfinished, format=FORMATS[path.suffix.lower()])
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
