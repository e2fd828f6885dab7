"""What people read goes to stderr; stdout is for results: paths of images, JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress


def stderr(quiet: bool = False) -> Console:
    """A console for messages; paths and prompts are printed as they are, without markup."""
    return Console(stderr=True, quiet=quiet, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(console: Console) -> Iterator[Progress]:
    """A progress bar with what is being done, the share of it, and the time left."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, disable=console.quiet or not console.is_terminal) as bar:
        yield bar


def size(count: int) -> str:
    """Bytes for people: 36.0 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    """Seconds for people: 0.42 s, 12.3 s, 3 min 05 s."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
