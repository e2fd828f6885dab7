"""The entry point: `tonfa` and its commands."""

from __future__ import annotations

from typing import Annotated

import typer

from tonfa.cli.bench import app as bench
from tonfa.cli.convert import convert
from tonfa.cli.doctor import doctor
from tonfa.cli.evaluate import evaluate
from tonfa.cli.generate import generate
from tonfa.cli.inspect import inspect
from tonfa.cli.quantize import quantize
from tonfa.cli.verify import verify
from tonfa.version import __version__

app = typer.Typer(
    name="tonfa",
    help="SVDQuant 4-bit FLUX: quantize a transformer, draw pictures with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(asked: bool) -> None:
    if asked:
        print(f"tonfa {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """SVDQuant 4-bit FLUX: quantize a transformer, draw pictures with it."""


app.command()(generate)
app.command()(quantize)
app.command()(inspect)
app.command()(convert)
app.command()(verify)
app.command()(evaluate)
app.command()(doctor)
app.add_typer(bench)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 failure with a message, 2 wrong usage, 130 interrupted."""
    app()
