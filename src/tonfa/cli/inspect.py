"""`tonfa inspect`: what a FLUX checkpoint holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tonfa.cli.failures import Debug, command
from tonfa.errors import printable

NAMED = 3
"""Tensors that an oddity names."""

_CONTAINERS = {
    "native": "native folder",
    "nunchaku": "Nunchaku single file",
    "nunchaku-folder": "Nunchaku folder",
    "nunchaku-lite": "Diffusers' nunchaku_lite folder",
    "diffusers": "dense Diffusers folder: not quantized, `tonfa quantize` makes it 4-bit",
}


@command(interrupted="nothing was changed")
def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint: a folder or a .safetensors file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show container, architecture, precision, and what fills the bytes of a FLUX checkpoint.

    Example:

    ```
    tonfa inspect svdq-int4_r32-flux.1-depth-dev.safetensors
    ```
    """
    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    from tonfa.checkpoint.reading import local_path
    from tonfa.models.flux.audit import inspect_checkpoint

    facts = inspect_checkpoint(local_path(path))
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)


def _print(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from tonfa.cli.console import size

    console = Console(markup=False, highlight=False, soft_wrap=True)
    dialect = f", {facts['dialect']} names" if facts["container"].startswith("nunchaku") else ""
    console.print(f"{printable(facts['path'])}\n{_CONTAINERS[facts['container']]}{dialect}")
    if facts["precision"] is not None:
        console.print(f"{facts['precision']}, rank {facts['rank']}, groups of {facts['group_size']}, {facts['dtype']}")
    else:
        console.print(facts["dtype"])
    console.print()
    for name, value in facts["architecture"].items():
        console.print(printable(f"{name:22} {value}"))
    console.print()
    table = Table("kind", "tensors", "size", box=None, pad_edge=False, header_style="bold")
    for kind, entry in facts["kinds"].items():
        table.add_row(kind, str(entry["tensors"]), size(entry["bytes"]))
    table.add_row("total", str(facts["tensors"]), size(facts["bytes"]))
    console.print(table)
    for oddity in facts["oddities"]:
        names = ", ".join(oddity["tensors"][:NAMED]) + (", ..." if oddity["count"] > NAMED else "")
        console.print(f"\nodd: {oddity['what']} ({oddity['count']}): {names}")
