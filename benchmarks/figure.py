"""The pieces that figures are drawn of: SVG text without a library."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

INK = "#1f2328"


def text(x: float, y: float, content: str, anchor: str = "middle", color: str = INK, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"{extra}>{escape(content, False)}</text>'


def rectangle(x: float, y: float, width: float, height: float, color: str, extra: str = "") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{color}"{extra}/>'


def figure(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A file: parts on a white card, so that the page behind it may be light or dark."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f"<title>{escape(title, False)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])
