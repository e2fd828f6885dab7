"""`tonfa verify`: whether a 4-bit FLUX checkpoint is sound, and how far it is from the dense weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from tonfa.cli.failures import FAILED, Debug, command
from tonfa.errors import printable

WORST = 10
"""Linears and problems that the text names; JSON has all."""


@command(interrupted="nothing was changed")
def verify(
    path: Annotated[Path, typer.Argument(help="4-bit checkpoint: a folder or a .safetensors file.")],
    against: Annotated[
        str | None,
        typer.Option("--against", help="Dense weights it was made of: a Diffusers folder or file, or a Hub id."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Read every tensor of a 4-bit FLUX checkpoint and check it. Exit code 1 if anything is wrong.

    Example:

    ```
    tonfa verify flux-depth-int4 --against black-forest-labs/FLUX.1-Depth-dev
    ```
    """
    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    from tonfa.checkpoint.reading import exists, local_path
    from tonfa.cli.quantize import find_transformer, read_flux_config
    from tonfa.models.flux.audit import verify_checkpoint

    dense = None
    if against is not None:
        dense = local_path(against)
        if not (exists(dense) and dense.is_file()):
            dense = find_transformer(against, "transformer", "--against")
            read_flux_config(dense)
    report = verify_checkpoint(local_path(path), dense)
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    if not report["ok"]:
        raise typer.Exit(FAILED)


def _print(report: dict[str, Any]) -> None:
    for entry in report["problems"][:WORST]:
        print(f"wrong: {entry['tensor']}: {entry['problem']}")
    more = len(report["problems"]) - WORST
    if more > 0:
        print(f"wrong: {more} more")
    if report["errors"]:
        print("largest relative errors of weights:")
    for name, error in list(report["errors"].items())[:WORST]:
        print(f"  {'not finite' if error is None else f'{error:.4f}'}  {name}")
    verdict = "sound" if report["ok"] else f"{len(report['problems'])} problems"
    print(f"{printable(report['path'])}: {report['tensors']} tensors, {verdict}")
