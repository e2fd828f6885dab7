"""`tonfa quantize`: a 16-bit FLUX transformer to a 4-bit checkpoint, from disk to disk."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tonfa.cli.calibration import Request, build
from tonfa.cli.console import duration, progress, size, stderr
from tonfa.cli.failures import Debug, command
from tonfa.cli.images import check_side
from tonfa.cli.options import (
    HIGHEST_GUIDANCE,
    Activations,
    DeviceOption,
    DtypeOption,
    check_offload,
    check_seed,
    parse_device,
    parse_dtype,
)
from tonfa.errors import CheckpointError
from tonfa.models.flux.plan import DENSE_CLASS

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from tonfa.checkpoint.strict import Spec
    from tonfa.models.flux.calibration import FluxCalibration
    from tonfa.quantizer.recipe import Recipe
    from tonfa.quantizer.stream import Report

RecipeName = Literal["tonfa", "svdquant", "svdquant-gptq"]

WORST = 5
"""Linears that the summary names."""


@command(interrupted="nothing half-written; run the same command again to go on")
def quantize(
    model: Annotated[str, typer.Argument(help="Diffusers pipeline or transformer: a folder or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the 4-bit checkpoint.")],
    recipe: Annotated[
        RecipeName, typer.Option(help="How: our best, the paper's method, or the released code's best.")
    ] = "tonfa",
    rank: Annotated[int, typer.Option(min=16, help="Width of the 16-bit low-rank branch, a multiple of 16.")] = 32,
    iterations: Annotated[
        int | None, typer.Option(min=0, help="Rounds of refining branch and residual.", show_default="the recipe's")
    ] = None,
    activations: Annotated[
        Activations, typer.Option(help="What a calibration chooses smoothing for. Results run with all others too.")
    ] = "int4",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPTS|default", help="Calibrate on pictures of these prompts, one a line.", show_default="off"
        ),
    ] = None,
    control_images: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|default",
            help="Pictures that a control model is given; `default` are depth maps of ours.",
            show_default="with --calibrate default",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of pictures to look at, 4 of each.", show_default="as the widest layer needs"),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of a calibration picture.", show_default="20; 4 without guidance")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            min=0, max=HIGHEST_GUIDANCE, help="Of a calibration picture.", show_default="10 with control, else 3.5"
        ),
    ] = None,
    picture_size: Annotated[
        int | None, typer.Option("--size", help="Side of a calibration picture.", show_default="the model's")
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Calibrate each block on what the quantized ones before it make.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of samples and decompositions.")] = 0,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep on the GPU only the part of the pipeline that is drawing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Calibrate on fewer samples than are needed.")] = False,
    subfolder: Annotated[str, typer.Option(help="Of the transformer in MODEL.")] = "transformer",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Quantize a FLUX transformer to 4-bit weights with a low-rank branch.

    Without `--calibrate` the weights alone are looked at: they are read and written a piece at a time, and any FLUX
    fits in a few gigabytes of memory. With it, the 16-bit pipeline first draws pictures, which takes its memory;
    then blocks are quantized one at a time, with the hidden states of all samples on the host (28 MB a sample for
    FLUX at 1024 x 1024) and one block on the device. An interrupted run leaves OUT.partial, from which the same
    command goes on.

    Example:

    ```
    tonfa quantize black-forest-labs/FLUX.1-Depth-dev --out flux-depth-int4
    tonfa quantize black-forest-labs/FLUX.1-Depth-dev --out flux-depth-int4 --calibrate default
    ```
    """
    console = stderr()
    from tonfa.checkpoint.tensors import TensorFolder
    from tonfa.models.flux.plan import flux_dims, flux_plan
    from tonfa.quantizer.recipe import named_recipe
    from tonfa.quantizer.stream import quantize_checkpoint
    from tonfa.quantizer.workspace import unfinished

    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out}: exists and is not empty; choose another folder or add --overwrite")
    check_seed(seed)
    check_side(picture_size, "--size")
    chosen = replace(named_recipe(recipe, rank), activations=activations, seed=seed)
    if iterations is not None:
        chosen = replace(chosen, iterations=iterations)
    place, kind = parse_device(device), parse_dtype(dtype)
    request = None
    if calibrate is not None:
        _check_placement(subfolder, offload, place)
        request = Request(
            model, calibrate, control_images, samples, steps, guidance, picture_size, sequential, offload, force
        )
    else:
        _refuse_without_calibration(control_images, samples, steps, guidance, picture_size, sequential, offload, force)
    folder = find_transformer(model, subfolder)
    config = read_flux_config(folder)
    source = TensorFolder(folder)
    target = _target(config, chosen)

    with progress(console) as bar:
        stages = _Stages(bar)
        calibration = None
        if request is not None:
            calibration = build(request, config, chosen, place, kind, stages.report)
        console.print(f"source     {folder}")
        console.print(f"recipe     {recipe}, rank {rank}, {chosen.iterations} iterations, {dtype}, on {place}")
        if calibration is not None:
            _describe(console, calibration)
        partial = unfinished(out)
        if partial.exists():
            console.print(f"resuming   {partial}")
        report = quantize_checkpoint(
            source,
            flux_plan(flux_dims(config)),
            config,
            out,
            chosen,
            dtype=kind,
            device=place,
            progress=stages.quantized,
            overwrite=overwrite,
            target=target,
            calibration=calibration,
        )
    _summarize(console, out, report)
    if as_json:
        print(json.dumps({"out": str(out), **asdict(report)}, indent=2))
    else:
        print(out)


class _Stages:
    """Progress bars of the two stages, each shown when it begins."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._tasks: dict[str, TaskID] = {}

    def _show(self, stage: str, done: int | None, total: int | None, note: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, note="")
        self._bar.update(self._tasks[stage], completed=done, total=total, note=note)

    def report(self, what: str, done: int, total: int) -> None:
        """Steps of pictures, or samples that have gone through a block."""
        if what == "sampling":
            self._show("sampling", done, total, "")
        else:
            self._show("quantizing", None, None, f"{what}: {done} of {total}")

    def quantized(self, name: str, finished: int, total: int) -> None:
        """A linear is made."""
        self._show("quantizing", finished, total, name)


def _check_placement(subfolder: str, offload: bool, place: torch.device) -> None:
    if subfolder != "transformer":
        raise typer.BadParameter("a calibration runs the pipeline's own transformer", param_hint="--subfolder")
    check_offload(offload, place)


def _refuse_without_calibration(*values: object) -> None:
    names = ("control-images", "samples", "steps", "guidance", "size", "sequential", "offload", "force")
    for name, value in zip(names, values, strict=True):
        if value is not None and value is not False:
            raise typer.BadParameter("it belongs to --calibrate, which was not given", param_hint=f"--{name}")


def _describe(console: Console, calibration: FluxCalibration) -> None:
    pictures, schedule = calibration.pictures, calibration.schedule
    sizes = ", ".join(f"{a} x {b}" for a, b in sorted({(p.width, p.height) for p in pictures}))
    order = "quantized" if calibration.sequential else "16-bit"
    console.print(
        f"samples    {calibration.count} from {len(pictures)} pictures of {schedule.steps} steps, {sizes}, guidance "
        f"{schedule.guidance:g}; blocks read the {order} ones before them, for {calibration.recipe.activations}"
    )
    console.print(
        f"memory     {size(calibration.nbytes())} on the disk, {size(calibration.host_bytes())} on the host "
        "for the samples"
    )


def find_transformer(model: str, subfolder: str, what: str = "MODEL") -> Path:
    """The local folder of the transformer: in a pipeline's folder, the folder itself, or downloaded.

    `what` names the argument in errors.
    """
    from tonfa.checkpoint.files import resolve
    from tonfa.checkpoint.reading import exists, local_path

    local = local_path(model)
    if exists(local) and local.is_dir():
        return local / subfolder if (local / subfolder).is_dir() else local
    if exists(local) or model.strip("/").count("/") != 1:
        raise CheckpointError(f"{what}: {model} is no folder here, nor a Hub id such as org/name")
    return resolve(model, subfolder=subfolder or None)


def read_flux_config(folder: Path) -> dict[str, Any]:
    """The configuration of a 16-bit FLUX transformer. Raises CheckpointError for any other model."""
    from tonfa.checkpoint.reading import read_json

    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"no FLUX model: {folder} has no config.json")
    config = read_json(path)
    name = config.get("_class_name")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{folder}: the model is quantized already; give the 16-bit model")
    if name != DENSE_CLASS:
        raise CheckpointError(f"no FLUX model: {path} is of class {name}, expected {DENSE_CLASS}")
    return config


def _target(config: Mapping[str, Any], recipe: Recipe) -> Spec:
    """Shapes and dtypes that the quantized model will ask for when it loads the checkpoint."""
    from tonfa.checkpoint.native import quantization_config
    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel

    quantization = quantization_config(recipe.rank, recipe)
    model = SVDQFluxTransformer2DModel._on_meta({**config, "quantization_config": quantization})
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}


def _summarize(console: Console, out: Path, report: Report) -> None:
    resumed = f", {report.resumed} of {len(report.errors)} linears were there already" if report.resumed else ""
    ratio = report.bytes_in / max(1, report.bytes_out)
    console.print(f"wrote      {out} in {duration(report.seconds)}{resumed}")
    console.print(f"size       {size(report.bytes_in)} -> {size(report.bytes_out)}, {ratio:.2f} x smaller")
    console.print("largest relative errors of weights:")
    for name, error in sorted(report.errors.items(), key=lambda item: -item[1])[:WORST]:
        console.print(f"  {error:.4f}  {name}")
