"""The waterfall's figure: bars as long as their milliseconds, the latest run, and the committed file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import waterfall

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h200.jsonl"
SVG = "{http://www.w3.org/2000/svg}"
TIMES = {"16-bit weights, eager": 200.0, "4-bit <weights>": 220.0, "fused kernels": 80.0}


def record(bar: int | None, technique: str | None, value: float, **case: Any) -> dict[str, Any]:
    place = {} if bar is None else {"bar": bar, "technique": technique}
    shape = {"height": 1024, "width": 1024, "batch": 1, "text_tokens": 512, "layers": [19, 38]}
    return {
        "bench": "waterfall",
        "case": {**shape, **case, **place},
        "settings": {"weights": "int4" if bar else "bf16"},
        "value": value,
        "runs": 20,
        "device": "NVIDIA H200",
        "baselines": {"bf16-eager": 200.0, "torchao-fp8-compiled": 100.0},
    }


RUN = [record(bar, name, value) for bar, (name, value) in enumerate(TIMES.items())]


def lines(*records: dict[str, Any]) -> list[str]:
    return [json.dumps(each) for each in records]


def test_the_latest_run_of_the_case_counts() -> None:
    earlier = [record(bar, "earlier", 1.0) for bar in (1, 2, 3, 0)]
    others = [record(None, None, 3.0), {**record(1, "step", 4.0), "bench": "step"}, record(2, "large", 5.0, batch=4)]
    written = lines(*earlier, RUN[1], RUN[2], RUN[0], *others)
    assert waterfall.bars(written, (1024, 1024), 1) == RUN
    assert [r["value"] for r in waterfall.bars(written, (1024, 1024), 4)] == [5.0]
    assert waterfall.bars(written, (512, 512), 1) == []


def test_bars_are_as_long_as_their_times() -> None:
    tree = ElementTree.fromstring(waterfall.draw(RUN))
    width, height = (float(side) for side in tree.attrib["viewBox"].split()[2:])
    card, *boxes = (
        [float(box.attrib.get(k, 0)) for k in ("x", "y", "width", "height")] for box in tree.iter(f"{SVG}rect")
    )
    assert card == [0, 0, width, height]
    solid = [box for box in boxes if box[0] == waterfall.LEFT]
    scale = solid[0][2] / 200.0
    assert [box[2] for box in solid] == pytest.approx([v * scale for v in TIMES.values()], abs=0.1)
    changes = [(box[0] - waterfall.LEFT, box[2]) for box in boxes if box[0] != waterfall.LEFT]
    assert changes == [
        (pytest.approx(200 * scale, abs=0.1), pytest.approx(20 * scale, abs=0.1)),  # lost
        (pytest.approx(80 * scale, abs=0.1), pytest.approx(140 * scale, abs=0.1)),  # saved
    ]
    assert all(x >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)
    words = ["".join(text.itertext()) for text in tree.iter(f"{SVG}text")]
    assert {"200.0 ms", "220.0 ms", "80.0 ms", "1.00 ×", "0.91 ×", "2.50 ×", "+ 4-bit <weights>"} <= set(words)
    assert "torchao FP8, compiled: 100.0 ms" in words and any("19 + 38 blocks" in word for word in words)


def test_committed_figure_is_drawn_from_the_records() -> None:
    records = waterfall.bars(RESULTS.read_text().splitlines(), (1024, 1024), 1)
    figure = ROOT / waterfall.OUT
    assert figure.exists() == bool(records)
    assert not records or figure.read_text() == waterfall.draw(records)
