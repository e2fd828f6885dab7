"""Records of `tonfa bench` for people: candidates with their ratios, and the parts of a step with their floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Record = Mapping[str, Any]

_WITHIN = ("rank", "activations", "bar", "technique")
"""Of a case, what may differ between records of one run."""


def print_records(records: Sequence[Record], console: Console) -> None:
    """A table for each case, in the order in which they were measured."""
    for group in _by_case(records):
        console.print(f"\n{_title(group[0])}", soft_wrap=True)
        console.print(_candidates(group))
        for line in group:
            if line["parts"]:
                floor = line["floor"]["value"]
                console.print(f"\n{line['variant']}: {line['value']:.4g} ms, floor {floor:.4g} ms", soft_wrap=True)
                console.print(_parts(line))


def _by_case(records: Sequence[Record]) -> list[list[Record]]:
    """Records whose baselines are of the same run."""
    groups: dict[str, list[Record]] = {}
    for line in records:
        groups.setdefault(_title(line), []).append(line)
    return list(groups.values())


def _title(line: Record) -> str:
    case = ", ".join(f"{n} {value}" for n, value in line["case"].items() if n not in _WITHIN)
    return f"{line['bench']}: {case}"


def _candidates(group: Sequence[Record]) -> Table:
    first = group[0]
    baselines = list(dict.fromkeys(name for line in group for name in line["baselines"]))
    table = _table()
    table.add_column("variant")
    unit = first["unit"]
    for column in ("error",) if unit == "relative" else (f"median {unit}", "min", "max"):
        table.add_column(column, justify="right")
    predicted = any("prediction" in line for line in group)
    if predicted:
        table.add_column("predicted", justify="right")
    for name in baselines:
        table.add_column(f"/ {name}" if unit == "relative" else f"x {name}", justify="right")
    memory = list(dict.fromkeys(name for line in group for name in line["memory_gib"]))
    for name in memory:
        table.add_column(f"{name} GiB", justify="right")
    for line in group:
        values = [line["value"]] if unit == "relative" else [line["value"], line["min"], line["max"]]
        table.add_row(
            line["variant"],
            *(f"{value:.4g}" for value in values),
            *([f"{line['prediction']['value']:.4g}" if "prediction" in line else ""] if predicted else []),
            *(f"{line['ratios'][name]:.3f}" if name in line["ratios"] else "" for name in baselines),
            *(f"{line['memory_gib'][name]:.3g}" if name in line["memory_gib"] else "" for name in memory),
        )
    return table


def _parts(line: Record) -> Table:
    table = _table()
    predicted = line.get("prediction", {}).get("parts", {})
    for column in ("part", "ms", "busy", *(["predicted"] if predicted else []), "floor", "gap", "why"):
        table.add_column(column, justify="left" if column in ("part", "why") else "right")
    for name, part in line["parts"].items():
        expected = [f"{predicted[name]:.3f}" if name in predicted else ""] if predicted else []
        gap = part["value"] - part["floor"]
        numbers = (f"{part[key]:.3f}" for key in ("value", "busy"))
        table.add_row(name, *numbers, *expected, f"{part['floor']:.3f}", f"{gap:.3f}", part["why"])
    return table


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="bold")
