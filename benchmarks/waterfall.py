"""Draw how each technique shortens a step from the records of `tonfa bench waterfall`: docs/waterfall.svg.

    tonfa bench waterfall --size 1024x1024
    python benchmarks/waterfall.py benchmarks/results/nvidia-h200.jsonl

A row for each technique: milliseconds with it and all above it, the part that it saves or costs, and how many times as
fast the step is as the first. Baselines that were measured beside them are dashed lines. The latest run of the case
that is asked for counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from figure import INK, figure, rectangle, text

OUT = Path("docs/waterfall.svg")

WIDTH = 760
LEFT, RIGHT, TOP, ROW, BAR = 214, 148, 66, 40, 24
GRAY, DENSE, OURS, BEST = "#59636e", "#8c959f", "#54aeff", "#0969da"
SAVED, LOST = "#ddf4ff", "#ffc1ba"
HALO = ' stroke="#ffffff" stroke-width="4" paint-order="stroke"'
NAMES = {"bf16-compiled": "bf16, compiled", "torchao-fp8-compiled": "torchao FP8, compiled"}

Record = Mapping[str, Any]


def bars(lines: Iterable[str], size: tuple[int, int], batch: int) -> list[Record]:
    """The records of the latest run of this case, in the order of their bars."""
    found: dict[int, Record] = {}
    for line in map(json.loads, lines):
        case = line["case"]
        if line["bench"] != "waterfall" or (case["height"], case["width"], case["batch"]) != (*size, batch):
            continue
        place = case.get("bar")
        if place is not None:
            # Ours are written first, so a run begins with the lowest bar that is there already.
            found = {} if place in found else found
            found[place] = line
    return [found[place] for place in sorted(found)]


def subtitle(line: Record) -> str:
    case = line["case"]
    double, single = case["layers"]
    runs = f"median of {line['runs']} interleaved runs"
    tokens = f"{case['height']} × {case['width']} pixels, {case['text_tokens']} text tokens, batch {case['batch']}"
    return f"{double} + {single} blocks, {tokens}; {runs} on one {line['device']}"


def draw(records: Sequence[Record]) -> str:
    """Every record is one row; ratios are to the first."""
    first, last = records[0], records[-1]
    references = {name: first["baselines"][name] for name in NAMES if name in first["baselines"]}
    span = WIDTH - LEFT - RIGHT
    scale = span / max([line["value"] for line in records] + list(references.values()))
    bottom = TOP + ROW * len(records)
    height = bottom + 14 + 18 * len(references)
    parts = [
        text(20, 26, "One step of FLUX.1's transformer", "start", extra=' font-size="16" font-weight="bold"'),
        text(20, 46, subtitle(last), "start", GRAY),
    ]
    for place, (name, value) in enumerate(sorted(references.items(), key=lambda item: -item[1])):
        x, y = LEFT + value * scale, bottom + 14 + 18 * place
        parts.append(f'<path d="M{x:.1f} {TOP}V{y + 6:.1f}" stroke="{GRAY}" stroke-dasharray="4 3" fill="none"/>')
        parts.append(text(x + 7, y + 6, f"{NAMES[name]}: {value:.1f} ms", "start", GRAY))
    before = None
    for place, line in enumerate(records):
        value, y = line["value"], TOP + ROW * place + (ROW - BAR) / 2
        end, middle = LEFT + value * scale, y + BAR / 2 + 4.5
        final = line is last
        weight = ' font-weight="bold"' if final else ""
        color = BEST if final else OURS if line["settings"]["weights"] != "bf16" else DENSE
        label = line["case"]["technique"]
        parts.append(text(LEFT - 12, middle, label if before is None else f"+ {label}", "end", extra=weight))
        parts.append(rectangle(LEFT, y, value * scale, BAR, color, ' rx="2"'))
        widest = end
        if before is not None:
            start, width = min(value, before) * scale, abs(value - before) * scale
            parts.append(rectangle(LEFT + start, y, width, BAR, SAVED if value <= before else LOST))
            edge = LEFT + before * scale
            parts.append(f'<path d="M{edge:.1f} {y - ROW + BAR:.1f}V{y + BAR:.1f}" stroke="{GRAY}" fill="none"/>')
            widest = max(end, edge)
        parts.append(text(widest + 8, middle, f"{value:.1f} ms", "start", extra=weight + HALO))
        ratio = first["value"] / value
        parts.append(text(WIDTH - 20, middle, f"{ratio:.2f} ×", "end", INK, ' font-weight="bold"'))
        before = value
    parts.append(f'<path d="M{LEFT} {TOP}V{bottom}" stroke="{INK}" fill="none"/>')
    return figure(WIDTH, height, "Milliseconds of one step of FLUX.1's transformer, technique after technique", parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("records", type=Path)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 1024), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    lines = arguments.records.read_text(encoding="utf-8").splitlines()
    records = bars(lines, tuple(arguments.size), arguments.batch)
    if len(records) < 2:
        parser.error(f"{arguments.records} has no waterfall of this case; run `tonfa bench waterfall` first")
    arguments.out.write_text(draw(records), encoding="utf-8")
    for line in records:
        print(f"| {line['case']['technique']} | {line['value']:.1f} ms | {records[0]['value'] / line['value']:.2f} × |")


if __name__ == "__main__":
    main()
