"""Launching a Triton kernel on the device of its arguments."""

from __future__ import annotations

from typing import Any


def launch(kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], **options: int) -> None:
    """Run `kernel` on the current stream; `arguments` include the constexpr ones, in order."""
    kernel[grid](*arguments, **options)
