"""What is drawn for a comparison: prompts, seeds, control images and, where they are known, the true objects."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tonfa.checkpoint.reading import read_json
from tonfa.errors import CheckpointError, UnsupportedError
from tonfa.evaluate.adherence import ColorTable

COLORS_FILE = "colors.json"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_KEYS = {"prompt", "seed", "control_image", "mask", "objects"}


@dataclass(frozen=True)
class Problem:
    """One picture."""

    prompt: str
    seed: int
    control: Path | None = None
    """Near is white."""
    mask: Path | None = None
    """8-bit picture: 0 is background, k + 1 is where object k is seen."""
    objects: tuple[str, ...] = ()
    """Color names of the objects."""

    def true_mask(self) -> Tensor | None:
        """(H, W) uint8. Raises CheckpointError for what is no 8-bit picture of one channel."""
        if self.mask is None:
            return None
        try:
            with Image.open(self.mask) as image:
                mode, values = image.mode, np.array(image)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise CheckpointError(f"{self.mask} is damaged or no picture: {error}") from error
        if mode != "L":
            raise CheckpointError(f"{self.mask}: expected an 8-bit picture of one channel, got mode {mode}")
        return torch.from_numpy(values)


def read_problems(
    prompts: Path,
    *,
    control_images: Path | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> list[Problem]:
    """The problems of a file: a prompt a line, or a JSON list of objects.

    Keys of an object are `prompt`, and if wanted `seed`, `control_image`, `mask` and `objects`, with paths relative to
    the file. A folder `control_images` gives its pictures in the order of their names, one a prompt. `samples` takes
    the first so many, or goes round the prompts again with new seeds; prompt i has seed `seed` + i unless it names one.
    Raises CheckpointError, naming file and place, for what is missing or makes no sense.
    """
    if not prompts.is_file():
        raise CheckpointError(f"--prompts: no file {prompts}")
    found = list(_rows(prompts, seed))
    if not found:
        raise CheckpointError(f"{prompts}: holds no prompt")
    if control_images is not None:
        found = _with_controls(found, control_images)
    for problem in found:
        for path in (problem.control, problem.mask):
            if path is not None and not path.is_file():
                raise CheckpointError(f"{prompts}: no file {path}")
    count = samples or len(found)
    again = (replace(found[i % len(found)], seed=seed + i) for i in range(len(found), count))
    return [*found[:count], *again]


def read_colors(prompts: Path) -> ColorTable:
    """The measured colors beside a file of problems, which name the colors of `objects`."""
    file = prompts.parent / COLORS_FILE
    if not file.is_file():
        raise CheckpointError(f"{prompts}: names the colors of objects, but there is no {file} that knows colors")
    value = read_json(file)
    try:
        return ColorTable(value["names"], torch.tensor(value["features"]), torch.tensor(value["labels"]))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: holds no names, features and labels of colors: {error}") from error


def _rows(prompts: Path, seed: int) -> Iterator[Problem]:
    try:
        text = prompts.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{prompts}: is no UTF-8 text: {error}") from error
    if prompts.suffix != ".json":
        lines = [line.strip() for line in text.splitlines()]
        for i, line in enumerate(line for line in lines if line):
            yield Problem(line, seed + i)
        return
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{prompts}: is no JSON: {error}") from error
    if not isinstance(value, list):
        raise CheckpointError(f"{prompts}: expected a JSON list of objects with a prompt each")
    for i, row in enumerate(value):
        yield _problem(row, seed + i, f"{prompts}: entry {i}", prompts.parent)


def _problem(row: Any, seed: int, where: str, folder: Path) -> Problem:
    if not isinstance(row, Mapping) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise CheckpointError(f"{where}: expected an object with a prompt")
    if unknown := set(row) - _KEYS:
        raise CheckpointError(f"{where}: {', '.join(sorted(unknown))} unknown; known are {', '.join(sorted(_KEYS))}")
    own = row.get("seed", seed)
    if type(own) is not int or not 0 <= own < 2**63:
        raise CheckpointError(f"{where}: seed is {own!r}, expected an integer of 0 to 2**63 - 1")
    objects = row.get("objects", [])
    if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
        raise CheckpointError(f"{where}: objects is {objects!r}, expected a list of color names")
    if objects and "mask" not in row:
        raise CheckpointError(f"{where}: names objects without a mask that says where they are")
    paths = {}
    for key in ("control_image", "mask"):
        if key in row and not isinstance(row[key], str):
            raise CheckpointError(f"{where}: {key} is {row[key]!r}, expected a file name")
        paths[key] = folder / row[key] if key in row else None
    return Problem(row["prompt"], own, paths["control_image"], paths["mask"], tuple(objects))


def _with_controls(problems: Sequence[Problem], folder: Path) -> list[Problem]:
    if not folder.is_dir():
        raise CheckpointError(f"--control-images: no folder {folder}")
    if any(problem.control is not None for problem in problems):
        raise UnsupportedError("--control-images: the prompts name control images of their own; leave it out")
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if len(pictures) != len(problems):
        raise CheckpointError(f"--control-images: {folder} holds {len(pictures)} pictures for {len(problems)} prompts")
    return [replace(problem, control=path) for problem, path in zip(problems, pictures, strict=True)]
