"""`tonfa bench`: speed, memory and error beside what people would run instead, in one process, with records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, get_args

import typer

from tonfa.cli.bench_options import (
    WEIGHTS,
    Baselines,
    Blocks,
    Model,
    Rank,
    Runs,
    Size,
    Sizes,
    StepOptions,
    TextTokens,
    known,
    parse_blocks,
    parse_pair,
    parse_sizes,
)
from tonfa.cli.bench_run import ENOUGH_RUNS, BenchRun, bench_command
from tonfa.cli.options import Activations, ActivationsOption, Attention, AttentionOption

if TYPE_CHECKING:
    from tonfa.bench.step import StepRequest

DEMO_MODEL = "demo/model"
KEPT, NOTHING = "cases that were finished are kept", "nothing was written"

app = typer.Typer(
    name="bench",
    help="Measure speed, memory and error beside baselines in the same run.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.command()
@bench_command(interrupted=KEPT)
def step(
    run: BenchRun,
    options: StepOptions,
    attention: AttentionOption = None,
    graph: Annotated[bool, typer.Option("--graph/--no-graph", help="Record the step as a CUDA graph.")] = True,
) -> None:
    """One step of a FLUX transformer with random weights: time, memory, and the parts of the time on a GPU.

    Baselines: `bf16-eager`, `bf16-eager-cudnn` and `bf16-compiled` are Diffusers' model, `torchao-fp8-compiled` is
    torchao's row-wise FP8, all but the first with cuDNN's attention; `rank-0` is the 4-bit model without its low-rank
    branch.

    Example:

    ```
    tonfa bench step --size 1024x1024 --baseline bf16-eager --baseline bf16-compiled
    ```
    """
    request = _step_request(run, options, attention, graph)
    from tonfa.bench.step import StepBench

    run.finish(StepBench(request, run.say).run(), options.enough())


@app.command()
@bench_command(interrupted=KEPT)
def waterfall(
    run: BenchRun,
    options: StepOptions,
    attention: Annotated[
        Attention, typer.Option("--attention", help="Of the last bars; auto is what is faster.")
    ] = "auto",
) -> None:
    """A step of Diffusers' 16-bit model, then of ours with one technique after another, all in turns.

    The way: 16-bit weights, cuDNN's attention, 4-bit weights with nothing fused, fused kernels, a CUDA graph, FP8
    attention where it runs, and with `--weights fp8` the weights kept in FP8. `python benchmarks/waterfall.py` draws
    the records. Further baselines are measured beside it.

    Example:

    ```
    tonfa bench waterfall --size 1024x1024 --baseline torchao-fp8-compiled
    ```
    """
    request = _step_request(run, options, attention, graph=run.gpu)
    from tonfa.bench.waterfall import bench_waterfall

    run.finish(bench_waterfall(request, options.baseline or (), run.say), options.enough())


def _step_request(run: BenchRun, options: StepOptions, attention: str | None, graph: bool) -> StepRequest:
    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    from tonfa.bench.dense import DENSE_BASELINES, EAGER
    from tonfa.bench.models import configuration
    from tonfa.bench.step import BASELINES, RANK_0, StepCase, StepRequest
    from tonfa.bench.variant import variants
    from tonfa.ops.table import DEFAULT_ATTENTION

    known(options.baseline, BASELINES, "--baseline")
    known(options.weights, WEIGHTS, "--weights")
    tokens = options.text_tokens or (512 if run.gpu else 64)
    return StepRequest(
        config=configuration(options.model or ("full" if run.gpu else "demo"), parse_blocks(options.blocks)),
        cases=[
            StepCase(height, width, batch, tokens)
            for height, width in parse_sizes(options.size, (1024, 1024) if run.gpu else (256, 256))
            for batch in options.batch or [1]
        ],
        variants=variants(
            options.weights or ["int4"],
            options.activations,
            options.rank,
            graph,
            run.device,
            attention or DEFAULT_ATTENTION,
        ),
        baselines=options.baseline or ((*DENSE_BASELINES, RANK_0) if run.gpu else (EAGER, RANK_0)),
        explicit=bool(options.baseline),
        runs=options.runs or ENOUGH_RUNS["step"],
        seed=run.seed,
        device=run.device,
        seconds=options.seconds,
    )


@app.command()
@bench_command(interrupted=NOTHING)
def linear(
    run: BenchRun,
    shape: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NxK", help="Out and in channels; may be repeated.", show_default=False),
    ] = None,
    rows: Annotated[list[int] | None, typer.Option("--rows", min=1, help="M; may be repeated.")] = None,
    rank: Rank = 32,
    activations: ActivationsOption = None,
    baseline: Baselines = None,
    runs: Runs = None,
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
    shapes = [parse_pair(text, "--shape", 64) for text in shape or ["9216x3072" if run.gpu else "3072x3072"]]
    count = runs or ENOUGH_RUNS["linear"]
    requests = [
        LinearRequest(n, k, m, rank, activations, baseline, count, run.seed, run.device)
        for n, k in shapes
        for m in rows or [4608 if run.gpu else 512]
    ]
    run.finish(line for request in requests for line in bench_linear(request, run.say))


@app.command()
@bench_command(interrupted=NOTHING)
def attention(
    run: BenchRun,
    tokens: Annotated[list[int] | None, typer.Option("--tokens", min=1, help="May be repeated.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 1,
    heads: Annotated[int | None, typer.Option("--heads", min=1, show_default="24; 2 on a CPU")] = None,
    head_dim: Annotated[int, typer.Option("--head-dim", min=8)] = 128,
    activations: ActivationsOption = None,
    baseline: Baselines = None,
    runs: Runs = None,
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
    number, count = heads or (24 if run.gpu else 2), runs or ENOUGH_RUNS["attention"]
    requests = [
        AttentionRequest(batch, number, length, head_dim, activations, baseline, count, run.seed, run.device)
        for length in tokens or [4608 if run.gpu else 512]
    ]
    run.finish(line for request in requests for line in bench_attention(request, run.say))


@app.command()
@bench_command(interrupted=NOTHING)
def image(
    run: BenchRun,
    model: Annotated[
        str, typer.Option("--model", help="Folder of a FLUX pipeline with a 16-bit transformer.")
    ] = DEMO_MODEL,
    transformer: Annotated[
        str | None, typer.Option("--transformer", help="4-bit checkpoint.", show_default="MODEL's, quantized now")
    ] = None,
    size: Size = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Denoising steps.")] = 30,
    text_tokens: TextTokens = None,
    rank: Annotated[int, typer.Option("--rank", min=16, help="Of the branch if MODEL's is quantized now.")] = 32,
    activations: ActivationsOption = None,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Pictures of each that are timed.")] = 3,
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

    ((height, width),) = parse_sizes([size] if size else None, (1024, 1024) if run.gpu else (256, 256))
    request = ImageRequest(
        model=model,
        transformer=transformer,
        height=height,
        width=width,
        steps=steps,
        text_tokens=text_tokens or (512 if run.gpu else 64),
        rank=rank,
        activations=activations,
        runs=runs,
        seed=run.seed,
        device=run.device,
    )
    run.finish(bench_image(request, run.say))


@app.command()
@bench_command(interrupted=NOTHING)
def error(
    run: BenchRun,
    model: Model = None,
    blocks: Blocks = None,
    size: Sizes = None,
    activations: Annotated[
        list[str] | None,
        typer.Option(
            "--activations", metavar="int4|int8|fp8|none", help="May be repeated.", show_default="fp8, int8, int4, none"
        ),
    ] = None,
    attention: AttentionOption = None,
    rank: Annotated[int, typer.Option("--rank", min=16, help="Width of the low-rank branch.")] = 32,
    text_tokens: TextTokens = None,
) -> None:
    """Error of one step by activations, against float32 with the same 4-bit weights and exact activations.

    Beside each stands its ratio to `int4`, the published W4A4 arithmetic with 16-bit attention. A folder's own weights
    are used, quantized now if they are 16-bit; the other models are random.

    Example:

    ```
    tonfa bench error --model demo/model --activations fp8 --activations int8
    ```
    """
    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    from tonfa.bench.error import ErrorRequest, bench_error
    from tonfa.dispatch import resolve_attention
    from tonfa.ops.table import DEFAULT_ATTENTION

    known(activations, get_args(Activations), "--activations")
    requests = [
        ErrorRequest(
            model=model or ("full" if run.gpu else "demo"),
            blocks=parse_blocks(blocks),
            height=height,
            width=width,
            text_tokens=text_tokens or (512 if run.gpu else 64),
            rank=rank,
            activations=activations or ["fp8", "int8", "int4", "none"],
            attention=resolve_attention(run.device, attention or DEFAULT_ATTENTION),
            seed=run.seed,
            device=run.device,
        )
        for height, width in parse_sizes(size, (1024, 1024) if run.gpu else (256, 256))
    ]
    run.finish(line for request in requests for line in bench_error(request, run.say))
