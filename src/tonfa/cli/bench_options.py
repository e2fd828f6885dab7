"""Options that several benchmarks share, and what their values mean."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from tonfa.cli.images import MULTIPLE
from tonfa.cli.options import ActivationsOption

WEIGHTS = ("int4", "fp8")

Sizes = Annotated[
    list[str] | None, typer.Option("--size", metavar="HxW", help="Pixels; may be repeated.", show_default=False)
]
Size = Annotated[
    str | None, typer.Option("--size", metavar="HxW", help="Pixels.", show_default="1024x1024; 256x256 on a CPU")
]
Batches = Annotated[list[int] | None, typer.Option("--batch", min=1, help="Pictures at once; may be repeated.")]
Baselines = Annotated[
    list[str] | None, typer.Option("--baseline", metavar="NAME", help="May be repeated.", show_default="what runs here")
]
Rank = Annotated[int, typer.Option("--rank", min=0, help="Width of the low-rank branch.")]
Runs = Annotated[int | None, typer.Option("--runs", min=1, help="Timed runs of each candidate.")]
Seconds = Annotated[
    float | None,
    typer.Option("--seconds", min=5, help="Timed runs of a case end after this long, 5 of each at least."),
]
TextTokens = Annotated[
    int | None, typer.Option("--text-tokens", min=1, max=512, help="Of the prompt.", show_default="512; 64 on a CPU")
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="`full` (FLUX.1-Depth-dev), `demo`, or the folder of a FLUX transformer.",
        show_default="full; demo on a CPU",
    ),
]
Blocks = Annotated[
    str | None,
    typer.Option("--blocks", metavar="DxS", help="Double and single blocks of a random model.", show_default="all"),
]
Weights = Annotated[
    list[str] | None,
    typer.Option("--weights", metavar="int4|fp8", help="What stays in memory; may be repeated.", show_default="int4"),
]


@dataclass(frozen=True)
class StepOptions:
    """Of every benchmark of a FLUX step."""

    size: Sizes = None
    batch: Batches = None
    model: Model = None
    blocks: Blocks = None
    weights: Weights = None
    activations: ActivationsOption = None
    rank: Rank = 32
    baseline: Baselines = None
    text_tokens: TextTokens = None
    runs: Runs = None
    seconds: Seconds = None

    def enough(self) -> int | None:
        """Runs that a record needs; None for the protocol's, which a time limit takes the place of."""
        from tonfa.bench.protocol import LEAST_RUNS

        return None if self.seconds is None else LEAST_RUNS


def known(names: Sequence[str] | None, choices: Sequence[str], option: str) -> None:
    """Raise a usage error for a name that does not exist."""
    for name in names or ():
        if name not in choices:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(choices)}", param_hint=option)


def parse_pair(text: str, option: str, multiple: int) -> tuple[int, int]:
    """Two positive multiples, such as 1024x768."""
    found = re.fullmatch(r"([0-9]+)x([0-9]+)", text)
    pair = (int(found[1]), int(found[2])) if found else (0, 0)
    if min(pair) <= 0 or any(side % multiple for side in pair):
        raise typer.BadParameter(f"{text!r} is no pair of positive multiples of {multiple}", param_hint=option)
    return pair


def parse_sizes(texts: Sequence[str] | None, default: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of every size."""
    return [parse_pair(text, "--size", MULTIPLE) for text in texts] if texts else [default]


def parse_blocks(text: str | None) -> tuple[int, int] | None:
    """Double and single blocks, such as 2x4; None for all."""
    return None if text is None else parse_pair(text, "--blocks", 1)
