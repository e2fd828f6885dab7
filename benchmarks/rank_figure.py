"""Draw held-out error against rank from the records of `error.py`: docs/error-against-rank.svg.

    for rank in 16 32 64 128; do
        python benchmarks/error.py --size 768 --rank $rank --kinds adaln adaln_hard gelu attn
    done
    python benchmarks/rank_figure.py benchmarks/results/cpu-zen4.jsonl --size 768

Geometric means over the layer kinds, both axes logarithmic. The latest record of each recipe and rank counts.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from figure import figure, text

OUT = Path("docs/error-against-rank.svg")


@dataclass(frozen=True)
class Series:
    variant: str
    activations: str
    label: str
    color: str
    dashes: str = ""


SERIES = (
    Series("rtn", "int4", "rounding alone", "#6e7781", "2 4"),
    Series("nf4-weight-only", "none", "NF4 weights, 16-bit inputs", "#6e7781", "6 3 2 3"),
    Series("int8-w8a8", "int8", "INT8 weights and inputs", "#6e7781", "1 3"),
    Series("svdquant-data-free", "int4", "SVDQuant, no data", "#9a6700", "7 4"),
    Series("tonfa-data-free", "int4", "tonfa, no data", "#1a7f37", "7 4"),
    Series("svdquant", "int4", "SVDQuant, the paper's", "#9a6700"),
    Series("svdquant-gptq", "int4", "SVDQuant, released, GPTQ", "#8250df"),
    Series("tonfa", "int4", "tonfa", "#1a7f37"),
    Series("tonfa", "fp8", "tonfa, FP8 activations", "#0969da"),
)
WITHOUT_BRANCH = ("rtn", "nf4-weight-only", "int8-w8a8")
"""Level lines: nothing in them has a rank."""
WIDTH, HEIGHT = 780, 440
LEFT, RIGHT, TOP, BOTTOM = 60, 210, 30, 50
LABEL_GAP = 15


def points(lines: Iterable[str], series: Series, size: int, seed: int) -> dict[int, float]:
    """Error by rank."""
    found = {}
    for record in lines:
        line = json.loads(record)
        case = line["case"]
        same = (line["bench"], line.get("variant"), case.get("activations")) == (
            "error",
            series.variant,
            series.activations,
        )
        if same and (case.get("kind"), case.get("size"), case.get("seed")) == ("geomean", size, seed):
            found[case["rank"]] = line["value"]
    return dict(sorted(found.items()))


class Axes:
    """From ranks and errors to pixels."""

    def __init__(self, ranks: Sequence[int], errors: Sequence[float]) -> None:
        self.ranks = ranks
        low, high = math.log(min(errors)), math.log(max(errors))
        margin = 0.06 * (high - low)
        self.low, self.high = low - margin, high + margin

    def x(self, rank: int) -> float:
        first, last = math.log(self.ranks[0]), math.log(self.ranks[-1])
        return LEFT + (math.log(rank) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(self, error: float) -> float:
        return TOP + (self.high - math.log(error)) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        steps = [m * 10.0**e for e in range(-4, 2) for m in (1, 1.5, 2, 3, 4, 6, 8)]
        return [t for t in steps if self.low <= math.log(t) <= self.high]


def spread(wanted: Sequence[float]) -> list[float]:
    """Heights of labels, moved down until none covers another."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = list(wanted)
    for before, after in pairwise(order):
        found[after] = max(found[after], found[before] + LABEL_GAP)
    return found


def draw(curves: dict[Series, dict[int, float]], size: int) -> str:
    ranks = sorted({rank for curve in curves.values() for rank in curve})
    axes = Axes(ranks, [error for curve in curves.values() for error in curve.values()])
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for tick in axes.ticks():
        y = axes.y(tick)
        parts.append(f'<line x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#d1d9e0"/>')
        parts.append(text(LEFT - 8, y + 4, f"{tick:g}", "end"))
    for rank in ranks:
        x = axes.x(rank)
        parts.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}" stroke="#1f2328"/>')
        parts.append(text(x, bottom + 20, str(rank)))
    parts.append(text((LEFT + right) / 2, HEIGHT - 10, "rank of the branch"))
    parts.append(text(LEFT - 40, TOP - 12, "relative output error on held-out tokens", "start"))
    heights = spread([axes.y(list(curve.values())[-1]) for curve in curves.values()])
    for (series, curve), height in zip(curves.items(), heights, strict=True):
        path = " ".join(f"{axes.x(rank):.1f},{axes.y(error):.1f}" for rank, error in curve.items())
        dashes = f' stroke-dasharray="{series.dashes}"' if series.dashes else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{series.color}" stroke-width="2"{dashes}/>')
        if series.variant not in WITHOUT_BRANCH:
            parts += [
                f'<circle cx="{axes.x(rank):.1f}" cy="{axes.y(error):.1f}" r="3" fill="{series.color}"/>'
                for rank, error in curve.items()
            ]
        parts.append(text(right + 10, height + 4, series.label, "start", series.color))
    title = f"Held-out relative output error against rank, layers of {size} channels"
    return figure(WIDTH, HEIGHT, title, parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    lines = arguments.records.read_text(encoding="utf-8").splitlines()
    curves = {series: points(lines, series, arguments.size, arguments.seed) for series in SERIES}
    missing = [series.variant for series, curve in curves.items() if len(curve) < 2]
    if missing:
        parser.error(f"no curve of {', '.join(missing)} at size {arguments.size}; run the first command of this file")
    arguments.out.write_text(draw(curves, arguments.size), encoding="utf-8")
    for series, curve in curves.items():
        print(f"| {series.label} | " + " | ".join(f"{error:.4f}" for error in curve.values()) + " |")


if __name__ == "__main__":
    main()
