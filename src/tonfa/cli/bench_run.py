"""What every benchmark does around its measurement: the device, messages, the records' file, the tables."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from tonfa.cli.console import stderr
from tonfa.cli.failures import Debug, command
from tonfa.cli.options import DeviceOption, parse_device
from tonfa.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from tonfa.bench.protocol import Say

ENOUGH_RUNS = {"step": 20, "waterfall": 20, "linear": 100, "attention": 100, "image": 1}
"""Fewer runs are printed, but not recorded, unless a time limit ended them."""
FILE_WIDTH = 200
"""Columns of a table that goes to no terminal."""

Seed = Annotated[int, typer.Option("--seed", min=0, help="Of weights and inputs.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="JSON lines are appended here.", show_default="benchmarks/results/<device>.jsonl"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the tables, write nothing.")]

_SHARED: dict[str, tuple[Any, Any]] = {
    "seed": (Seed, 0),
    "device": (DeviceOption, "auto"),
    "out": (Out, None),
    "dry_run": (DryRun, False),
    "debug": (Debug, False),
}
"""Options of every benchmark: annotation and default."""


@dataclass(frozen=True)
class BenchRun:
    """Where a benchmark runs and where its records go."""

    device: torch.device
    seed: int
    out: Path | None
    dry_run: bool
    say: Say

    @property
    def gpu(self) -> bool:
        """Defaults are larger there."""
        return self.device.type == "cuda"

    def finish(self, records: Iterable[Mapping[str, Any]], enough: int | None = None) -> None:
        """Write every record of `enough` runs (ENOUGH_RUNS) as it comes, then print all of them."""
        from rich.console import Console

        from tonfa.bench.protocol import append, results_file
        from tonfa.cli.bench_tables import print_records

        file = self.out or results_file(self.device)
        if not self.dry_run:
            check_writable(file)
        seen: list[Mapping[str, Any]] = []
        try:
            for line in records:
                seen.append(line)
                if self.dry_run:
                    continue
                if line["runs"] >= (enough or ENOUGH_RUNS.get(line["bench"], 1)):
                    append(file, line)
                else:
                    self.say(f"not recorded, {line['runs']} runs are too few: {line['variant']}")
        finally:  # cases that were finished are shown even if a later one fails
            console = Console(markup=False, highlight=False)
            if not console.is_terminal:
                console.width = FILE_WIDTH
            print_records(seen, console)
        if not self.dry_run:
            self.say(f"records in {file}")


def bench_command(*, interrupted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`command` for a benchmark, whose first argument is its BenchRun; it has the options of all benchmarks besides.

    A parameter that is a dataclass stands for its fields: each of them is an option.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        _, *own = inspect.signature(function).parameters.values()
        groups = {p.name: hints[p.name] for p in own if is_dataclass(hints[p.name])}
        alone = {p.name: (hints[p.name], p.default) for p in own if p.name not in groups}
        grouped = {name: _options(group) for name, group in groups.items()}
        options = {k: v for each in grouped.values() for k, v in each.items()} | alone | _SHARED

        @wraps(function)
        def run(*, seed: int, device: str, out: Path | None, dry_run: bool, debug: bool, **given: Any) -> None:
            made = {name: groups[name](**{k: given.pop(k) for k in each}) for name, each in grouped.items()}
            function(BenchRun(parse_device(device), seed, out, dry_run, speaker()), **made, **given)

        run.__annotations__ = {name: kind for name, (kind, _) in options.items()}
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
                for name, (kind, default) in options.items()
            ]
        )
        return command(interrupted=interrupted)(run)

    return decorate


def _options(group: Any) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of each field."""
    hints = get_type_hints(group, include_extras=True)
    return {field.name: (hints[field.name], field.default) for field in fields(group)}


def speaker() -> Say:
    """Messages on stderr, each after the seconds since now."""
    console, started = stderr(), time.perf_counter()

    def say(text: str) -> None:
        console.print(f"{time.perf_counter() - started:7.1f} s  {text}")

    return say


def check_writable(file: Path) -> None:
    """Raise before anything is measured if the records could not be kept."""
    if file.is_dir():
        raise UnsupportedError(f"--out: {file} is a folder; name a file")
    existing = next(path for path in (file, *file.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK) or (existing != file and not existing.is_dir()):
        raise UnsupportedError(f"--out: {file} cannot be written")
