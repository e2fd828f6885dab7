"""Contact sheets: a row of pictures for each problem, its prompt above, and what tells two pictures apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAIN = 4
"""Of the differences that are shown."""

MARGIN, LINE, FONT = 8, 20, 15
"""Pixels."""


@dataclass(frozen=True)
class Row:
    """A prompt and the pictures below it, of one size; None leaves its place empty."""

    prompt: str
    pictures: tuple[Image.Image | None, ...]


def to_pil(
    picture: Tensor,  # (3, H, W) uint8
) -> Image.Image:
    """For people and files."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def difference(a: Image.Image, b: Image.Image) -> Image.Image:
    """|a - b| of each value, GAIN times as large."""
    apart = np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)) * GAIN
    return Image.fromarray(apart.clip(0, 255).astype(np.uint8))


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def contact_sheet(titles: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """One column for each title."""
    font = ImageFont.load_default(size=FONT)
    side = max(max(picture.size) for row in rows for picture in row.pictures if picture is not None)
    width = len(titles) * (side + MARGIN) + MARGIN
    captions = [_wrapped(row.prompt, font, width - 2 * MARGIN) for row in rows]
    height = 2 * MARGIN + LINE + sum(len(c) * LINE + side + 2 * MARGIN for c in captions)
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((MARGIN + column * (side + MARGIN), MARGIN), title, "gray", font)
    y = 2 * MARGIN + LINE
    for row, caption in zip(rows, captions, strict=True):
        for text in caption:
            pen.text((MARGIN, y), text, "black", font)
            y += LINE
        for column, picture in enumerate(row.pictures):
            if picture is not None:
                sheet.paste(picture, (MARGIN + column * (side + MARGIN), y + MARGIN // 2))
        y += side + 2 * MARGIN
    return sheet
