"""Comparisons for people: one table of figures, one of velocity errors by timestep, one of the worst layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tonfa.evaluate.compare import Adherence, Comparison, Evaluation
    from tonfa.evaluate.layers import LayerError
    from tonfa.evaluate.statistics import Estimate

FILE_WIDTH = 200
"""Columns of a table that goes to no terminal."""
MOST_TIMESTEPS = 8


def short_names(comparisons: Sequence[Comparison]) -> list[str]:
    """The last parts of the candidates' paths, or the paths where two end alike."""
    names = [comparison.name for comparison in comparisons]
    short = [Path(name).name for name in names]
    return short if len(set(short)) == len(short) else names


def print_comparisons(evaluation: Evaluation, comparisons: Sequence[Comparison], worst: int) -> None:
    """All tables on stdout."""
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    names = short_names(comparisons)
    console.print(_pictures(names, comparisons))
    console.print()
    console.print(_timesteps(names, comparisons))
    if evaluation.adherence is not None:
        console.print()
        known = [evaluation.adherence, *(c.adherence for c in comparisons if c.adherence is not None)]
        console.print(_adherence(["reference", *names], known))
    for name, comparison in zip(names, comparisons, strict=True):
        if comparison.layers:
            console.print(f"\nworst layers of {name}, by the error of their outputs", soft_wrap=True)
            console.print(_layers(comparison.layers, worst))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _with_interval(value: float | None, low: float | None, high: float | None, digits: int) -> str:
    if value is None:
        return "-"
    text = f"{value:.{digits}f}"
    return text if low is None or high is None else f"{text} [{low:.{digits}f}, {high:.{digits}f}]"


def _estimate(value: Estimate | None, digits: int, of_equal: str = "-") -> str:
    """`of_equal` stands for a figure that is infinite for every picture."""
    if value is None:
        return "-"
    if value.count == 0:
        return of_equal
    text = _with_interval(value.mean, value.low, value.high, digits)
    return f"{text}, {value.infinite} equal" if value.infinite else text


def _number(value: float | None, digits: int, missing: str = "-") -> str:
    return missing if value is None else f"{value:.{digits}f}"


def _pictures(names: Sequence[str], comparisons: Sequence[Comparison]) -> Table:
    with_lpips = any(c.lpips is not None for c in comparisons)
    table = _table(
        "candidate", "velocity error", "PSNR dB", "median", "5th pct", "SSIM", "5th pct", *["LPIPS"] * with_lpips
    )
    for name, c in zip(names, comparisons, strict=True):
        row = [
            name,
            _with_interval(c.velocity.overall, c.velocity.low, c.velocity.high, 4),
            _estimate(c.psnr, 2, "equal"),
            _number(c.psnr.median, 2, "equal"),
            _number(c.psnr.percentile_5, 2, "equal"),
            _estimate(c.ssim, 4),
            _number(c.ssim.percentile_5, 4),
        ]
        table.add_row(*row, *[_estimate(c.lpips, 4)] * with_lpips)
    return table


def _timesteps(names: Sequence[str], comparisons: Sequence[Comparison]) -> Table:
    steps = comparisons[0].velocity.timesteps
    count = min(len(steps), MOST_TIMESTEPS)
    shown = [round(i * (len(steps) - 1) / max(1, count - 1)) for i in range(count)]
    table = _table("velocity error at timestep", *(f"{steps[i]:.3f}" for i in shown))
    for name, c in zip(names, comparisons, strict=True):
        table.add_row(name, *(f"{c.velocity.by_timestep[i]:.4f}" for i in shown))
    return table


def _adherence(names: Sequence[str], found: Sequence[Adherence]) -> Table:
    table = _table("adherence", "silhouette F1", "recall", "precision", "color", "objects")
    for name, a in zip(names, found, strict=True):
        edges = (a.silhouette_f1, a.silhouette_recall, a.silhouette_precision)
        table.add_row(name, *(_estimate(e, 3) for e in edges), _estimate(a.color, 3), str(a.objects))
    return table


def _layers(layers: Sequence[LayerError], worst: int) -> Table:
    """Sorted by the error of outputs, or of weights where no inputs were collected; what has no value comes first."""

    def size(layer: LayerError) -> float:
        errors = [e for e in (layer.output, layer.weight) if e is not None]
        return errors[0] if errors else math.inf

    table = _table("layer", "output", "weight")
    for layer in sorted(layers, key=size, reverse=True)[:worst]:
        table.add_row(layer.name, *("-" if e is None else f"{e:.4f}" for e in (layer.output, layer.weight)))
    return table
