"""Pictures on disk: opening them with clear errors, choosing sizes, naming and writing outputs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from tonfa.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from PIL.Image import Image

MULTIPLE = 16
"""FLUX's latents are an eighth of the picture's size, and the transformer reads them in patches of 2 x 2."""

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
    if pixels is not None and (pixels <= 0 or pixels % MULTIPLE):
        hint = f"; the nearest is {nearest_multiple(pixels)}" if pixels > 0 else ""
        raise typer.BadParameter(f"{pixels} is no positive multiple of {MULTIPLE}{hint}", param_hint=option)


def output_paths(output: Path, count: int) -> list[Path]:
    """Where `count` pictures go: the file itself, or numbered files beside it or in the folder.

    Creates the folder. Raises a usage error for an unknown kind of file, UnsupportedError if the folder cannot be
    written to.
    """
    is_folder = output.is_dir() or not output.suffix
    if not is_folder and output.suffix.lower() not in FORMATS:
        raise typer.BadParameter(
            f"{output.name}: the name must end with one of {', '.join(FORMATS)}, or be a folder", param_hint="--output"
        )
    file = output / "image.png" if is_folder else output
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnsupportedError(f"--output: the folder {file.parent} cannot be made: {error.strerror}") from error
    if not os.access(file.parent, os.W_OK):
        raise UnsupportedError(f"--output: the folder {file.parent} cannot be written to")
    if count == 1:
        return [file]
    return [file.with_stem(f"{file.stem}-{i}") for i in range(count)]


def write_image(image: Image, path: Path) -> None:
    """Write under another name first, so that `path` is always a complete picture."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        image.save(unfinished, format=FORMATS[path.suffix.lower()])
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
