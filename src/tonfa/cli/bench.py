"""`tonfa bench`: speed, memory and error beside what people would run instead, in one process, with records."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from tonfa.cli.console import stderr
from tonfa.cli.failures import Debug, command
from tonfa.cli.images import MULTIPLE
from tonfa.cli.options import Activations, ActivationsOption, DeviceOption, parse_device
from tonfa.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

    from tonfa.bench.protocol import Say

DEMO_MODEL = "demo/model"
ENOUGH_RUNS = {"step": 20, "linear": 100, "attention": 100, "image": 1}
"""Fewer runs are printed, but not recorded."""

WEIGHTS = ("int4", "fp8")
FILE_WIDTH = 200
"""Columns of a table that goes to no terminal."""

Sizes = Annotated[
    list[str] | None, typer.Option("--size", metavar="HxW", help="Pixels; may be repeated.", show_default=False)
]
Batches = Annotated[list[int] | None, typer.Option("--batch", min=1, help="Pictures at once; may be repeated.")]
Baselines = Annotated[
    list[str] | None, typer.Option("--baseline", metavar="NAME", help="May be repeated.", show_default="what runs here")
]
Rank = Annotated[int, typer.Option("--rank", min=0, help="Width of the low-rank branch.")]
Runs = Annotated[int | None, typer.Option("--runs", min=1, help="Timed runs of each candidate.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of weights and inputs.")]
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
Out = Annotated[
    Path | None,
    typer.Option("--out", help="JSON lines are appended here.", show_default="benchmarks/results/<device>.jsonl"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the tables, write nothing.")]

app = typer.Typer(
    name="bench",
    help="Measure speed, memory and error beside baselines in the same run.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command()
@command(interrupted="cases that were finished are kept")
def step(
    size: Sizes = None,
    batch: Batches = None,
    model: Model = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights", metavar="int4|fp8", help="What stays in memory; may be repeated.", show_default="int4"
        ),
    ] = None,
    activations: ActivationsOption = None,
    rank: Rank = 32,
    graph: Annotated[bool, typer.Option("--graph/--no-graph", help="Record the step as a CUDA graph.")] = True,
    baseline: Baselines = None,
    text_tokens: TextTokens = None,
    runs: Runs = None,
    seed: Seed = 0,
    device: DeviceOption = "auto",
    out: Out = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """One step of a FLUX transformer with random weights: time, memory, and the parts of the time on a GPU.

    Baselines: `bf16-eager` and `bf16-compiled` are Diffusers' model, `torchao-fp8-compiled` is torchao's row-wise FP8,
    the compiled ones with cuDNN's attention; `rank-0` is the 4-bit model without its low-rank branch.

    Example:

    ```
    tonfa bench step --size 1024x1024 --baseline bf16-eager --baseline bf16-compiled
    ```
    """
    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    from tonfa.bench.dense import DENSE_BASELINES, EAGER
    from tonfa.bench.models import configuration
    from tonfa.bench.step import BASELINES, RANK_0, StepBench, StepCase, StepRequest
    from tonfa.bench.variant import variants

    known(baseline, BASELINES, "--baseline")
    known(weights, WEIGHTS, "--weights")
    place, say = parse_device(device), speaker()
    gpu = place.type == "cuda"
    sides = parse_sizes(size, (1024, 1024) if gpu else (256, 256))
    tokens = text_tokens or (512 if gpu else 64)
    request = StepRequest(
        config=configuration(model or ("full" if gpu else "demo")),
        cases=[StepCase(h, w, b, tokens) for h, w in sides for b in batch or [1]],
        variants=variants(weights or ["int4"], activations, rank, graph, place),
        baselines=baseline or ((*DENSE_BASELINES, RANK_0) if gpu else (EAGER, RANK_0)),
        explicit=bool(baseline),
        runs=runs or ENOUGH_RUNS["step"],
        seed=seed,
        device=place,
    )
    finish(StepBench(request, say).run(), place, out, dry_run, say)


@app.command()
@command(interrupted="nothing was written")
def linear(
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NxK", help="Out and in channels; may be repeated.", show_default=False),
    ] = None,
    rows: Annotated[list[int] | None, typer.Option("--rows", min=1, help="M; may be repeated.")] = None,
    rank: Rank = 32,
    activations: ActivationsOption = None,
    baseline: Baselines = None,
    runs: Runs = None,
    seed: Seed = 0,
    device: DeviceOption = "auto",
    out: Out = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """One quantized linear, quantization of its input included. 9216x3072 at 4608 rows; on a CPU 3072x3072 at 512.

    Baselines: `cublas-bf16`, `scaled-mm-fp8` (the product alone, of inputs quantized beforehand) and `comfy-kitchen`
    (its SVDQuant linear) on a GPU; `torch-bf16` and `torch-fp32` on a CPU.

    Example:

    ```
    tonfa bench linear --shape 3072x3072 --rows 512 --rows 4608 --device cpu
    ```
    """
    from tonfa.bench.linear import BASELINES, LinearRequest, bench_linear

    known(baseline, BASELINES, "--baseline")
    place, say = parse_device(device), speaker()
    gpu = place.type == "cuda"
    shapes = [parse_pair(text, "--shape", 64) for text in shape or ["9216x3072" if gpu else "3072x3072"]]
    requests = [
        LinearRequest(n, k, m, rank, activations, baseline, runs or ENOUGH_RUNS["linear"], seed, place)
        for n, k in shapes
        for m in rows or [4608 if gpu else 512]
    ]
    finish((line for request in requests for line in bench_linear(request, say)), place, out, dry_run, say)


@app.command()
@command(interrupted="nothing was written")
def attention(
    tokens: Annotated[list[int] | None, typer.Option("--tokens", min=1, help="May be repeated.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 1,
    heads: Annotated[int | None, typer.Option("--heads", min=1, show_default="24; 2 on a CPU")] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", min=8)] = 128,
    activations: ActivationsOption = None,
    baseline: Baselines = None,
    runs: Runs = None,
    seed: Seed = 0,
    device: DeviceOption = "auto",
    out: Out = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Attention of 4608 tokens, on a CPU of 512: what the 4-bit model uses here, beside PyTorch's.

    Baselines: `sdpa-default`, `sdpa-flash`, `sdpa-cudnn`, `sdpa-efficient`, `sdpa-math`.

    Example:

    ```
    tonfa bench attention --tokens 4608 --baseline sdpa-default --baseline sdpa-cudnn
    ```
    """
    from tonfa.bench.attention import BASELINES, AttentionRequest, bench_attention

    known(baseline, BASELINES, "--baseline")
    place, say = parse_device(device), speaker()
    gpu = place.type == "cuda"
    count = heads or (24 if gpu else 2)
    requests = [
        AttentionRequest(
            batch, count, length, head_dim, activations, baseline, runs or ENOUGH_RUNS["attention"], seed, place
        )
        for length in tokens or [4608 if gpu else 512]
    ]
    finish((line for request in requests for line in bench_attention(request, say)), place, out, dry_run, say)


@app.command()
@command(interrupted="nothing was written")
def image(
    model: Annotated[
        str, typer.Option("--model", help="Folder of a FLUX pipeline with a 16-bit transformer.")
    ] = DEMO_MODEL,
    transformer: Annotated[
        str | None, typer.Option("--transformer", help="4-bit checkpoint.", show_default="MODEL's, quantized now")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--size", metavar="HxW", help="Pixels.", show_default="1024x1024; 256x256 on a CPU")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.")] = 30,
    text_tokens: TextTokens = None,
    rank: Annotated[int, typer.Option("--rank", min=16, help="Of the branch if MODEL's is quantized now.")] = 32,
    activations: ActivationsOption = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Pictures of each that are timed.")] = 3,
    seed: Seed = 0,
    device: DeviceOption = "auto",
    out: Out = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Seconds of a whole picture with a pipeline's 16-bit transformer, and with the same in 4 bits.

    Example:

    ```
    tonfa bench image --model demo/model --size 256x256 --steps 30
    ```
    """
    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    from tonfa.bench.image import ImageRequest, bench_image

    place, say = parse_device(device), speaker()
    gpu = place.type == "cuda"
    ((height, width),) = parse_sizes([size] if size else None, (1024, 1024) if gpu else (256, 256))
    request = ImageRequest(
        model=model,
        transformer=transformer,
        height=height,
        width=width,
        steps=steps,
        text_tokens=text_tokens or (512 if gpu else 64),
        rank=rank,
        activations=activations,
        runs=runs,
        seed=seed,
        device=place,
    )
    finish(bench_image(request, say), place, out, dry_run, say)


@app.command()
@command(interrupted="nothing was written")
def error(
    model: Model = None,
    size: Sizes = None,
    activations: Annotated[
        list[str] | None,
        typer.Option(
            "--activations", metavar="int4|int8|fp8|none", help="May be repeated.", show_default="fp8, int8, int4, none"
        ),
    ] = None,
    rank: Annotated[int, typer.Option("--rank", min=16, help="Width of the low-rank branch.")] = 32,
    text_tokens: TextTokens = None,
    seed: Seed = 0,
    device: DeviceOption = "auto",
    out: Out = None,
    dry_run: DryRun = False,
    debug: Debug = False,
) -> None:
    """Error of one step by activations, against float32 with the same 4-bit weights and exact activations.

    Beside each stands its ratio to `int4`, the published W4A4 arithmetic. A folder's own weights are used, quantized
    now if they are 16-bit; the other models are random.

    Example:

    ```
    tonfa bench error --model demo/model --activations fp8 --activations int8
    ```
    """
    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    from tonfa.bench.error import ErrorRequest, bench_error

    known(activations, get_args(Activations), "--activations")
    place, say = parse_device(device), speaker()
    gpu = place.type == "cuda"
    requests = [
        ErrorRequest(
            model=model or ("full" if gpu else "demo"),
            height=height,
            width=width,
            text_tokens=text_tokens or (512 if gpu else 64),
            rank=rank,
            activations=activations or ["fp8", "int8", "int4", "none"],
            seed=seed,
            device=place,
        )
        for height, width in parse_sizes(size, (1024, 1024) if gpu else (256, 256))
    ]
    finish((line for request in requests for line in bench_error(request, say)), place, out, dry_run, say)


def speaker() -> Say:
    """Messages on stderr, each after the seconds since now."""
    console, started = stderr(), time.perf_counter()

    def say(text: str) -> None:
        console.print(f"{time.perf_counter() - started:7.1f} s  {text}")

    return say


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


def finish(
    records: Iterable[Mapping[str, Any]], device: torch.device, out: Path | None, dry_run: bool, say: Say
) -> None:
    """Write every record as it comes, then print all of them."""
    from rich.console import Console

    from tonfa.bench.protocol import append, results_file
    from tonfa.cli.bench_tables import print_records

    file = out or results_file(device)
    if not dry_run:
        check_writable(file)
    seen: list[Mapping[str, Any]] = []
    try:
        for line in records:
            seen.append(line)
            if dry_run:
                continue
            if line["runs"] >= ENOUGH_RUNS.get(line["bench"], 1):
                append(file, line)
            else:
                say(f"not recorded, {line['runs']} runs are too few: {line['variant']}")
    finally:  # cases that were finished are shown even if a later one fails
        console = Console(markup=False, highlight=False)
        if not console.is_terminal:
            console.width = FILE_WIDTH
        print_records(seen, console)
    if not dry_run:
        say(f"records in {file}")


def check_writable(file: Path) -> None:
    """Raise before anything is measured if the records could not be kept."""
    if file.is_dir():
        raise UnsupportedError(f"--out: {file} is a folder; name a file")
    existing = next(path for path in (file, *file.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK) or (existing != file and not existing.is_dir()):
        raise UnsupportedError(f"--out: {file} cannot be written")
