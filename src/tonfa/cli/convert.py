"""`tonfa convert`: a 4-bit FLUX checkpoint in another container, or as dense weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tonfa.cli.console import duration, stderr
from tonfa.cli.failures import Debug, command

Form = Literal["native", "nunchaku", "nunchaku-folder", "nunchaku-lite", "dense"]


@command(interrupted="nothing half-written")
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="4-bit checkpoint: a folder, a file or a Hub id.")],
    out: Annotated[Path, typer.Argument(metavar="DST", help="File for `nunchaku`, else a folder.")],
    to: Annotated[Form, typer.Option("--to", help="What to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in DST.")] = False,
    debug: Debug = False,
) -> None:
    """Write a 4-bit FLUX checkpoint in another container.

    `native` and Nunchaku's forms hold the same numbers. `nunchaku-lite` is for Diffusers alone, whose layers behind a
    GELU quantize signed inputs. `dense` rounds.

    Example:

    ```
    tonfa convert flux-depth-int4 flux-depth.safetensors --to nunchaku
    ```
    """
    import time

    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    from tonfa.models.flux.export import export, read_quantized

    console, started = stderr(), time.perf_counter()
    export(read_quantized(source), out, to, overwrite=overwrite)
    console.print(f"wrote      {out} ({to}) in {duration(time.perf_counter() - started)}")
    print(out)
