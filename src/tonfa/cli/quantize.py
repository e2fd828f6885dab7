"""`tonfa quantize`: a 16-bit FLUX transformer to a 4-bit checkpoint, from disk to disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tonfa.cli.console import duration, progress, size, stderr
from tonfa.cli.failures import Debug, command
from tonfa.cli.options import DeviceOption, DtypeOption, parse_device, parse_dtype
from tonfa.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from tonfa.checkpoint.strict import Spec
    from tonfa.quantize.recipe import Recipe
    from tonfa.quantize.stream import Report

DENSE_CLASS = "FluxTransformer2DModel"
WORST = 5
"""Linears that the summary names."""


@command(interrupted="nothing half-written; run the same command again to go on")
def quantize(
    model: Annotated[str, typer.Argument(help="Diffusers pipeline or transformer: a folder or a Hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the 4-bit checkpoint.")],
    rank: Annotated[int, typer.Option(min=16, help="Width of the 16-bit low-rank branch, a multiple of 16.")] = 32,
    iterations: Annotated[int, typer.Option(min=0, help="Rounds of refining branch and residual.")] = 8,
    subfolder: Annotated[str, typer.Option(help="Of the transformer in MODEL.")] = "transformer",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "bfloat16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint in OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
    debug: Debug = False,
) -> None:
    """Quantize a FLUX transformer to 4-bit weights with a low-rank branch. No calibration data is needed.

    The weights are read and written a piece at a time: any FLUX fits in a few gigabytes of memory. An interrupted run
    leaves OUT.partial, from which the same command goes on.

    Example:

    ```
    tonfa quantize black-forest-labs/FLUX.1-Depth-dev --out flux-depth-int4
    ```
    """
    console = stderr()
    from tonfa.checkpoint.tensors import TensorFolder
    from tonfa.models.flux.plan import flux_dims, flux_plan
    from tonfa.quantize.recipe import Recipe
    from tonfa.quantize.stream import quantize_checkpoint

    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out}: exists and is not empty; choose another folder or add --overwrite")
    place, recipe = parse_device(device), Recipe(rank=rank, iterations=iterations)
    folder = find_transformer(model, subfolder)
    config = read_flux_config(folder)
    source = TensorFolder(folder)
    console.print(f"source     {folder}")
    console.print(f"recipe     rank {rank}, {iterations} iterations, {dtype}, on {place}")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        console.print(f"resuming   {partial}")

    with progress(console) as bar:
        task = bar.add_task("quantizing", total=None, note="")

        def show(name: str, finished: int, total: int) -> None:
            bar.update(task, completed=finished, total=total, note=name)

        report = quantize_checkpoint(
            source,
            flux_plan(flux_dims(config)),
            config,
            out,
            recipe,
            dtype=parse_dtype(dtype),
            device=place,
            progress=show,
            overwrite=overwrite,
            target=_target(config, recipe),
        )
    _summarize(console, out, report)
    if as_json:
        print(json.dumps({"out": str(out), **asdict(report)}, indent=2))
    else:
        print(out)


def find_transformer(model: str, subfolder: str) -> Path:
    """The local folder of the transformer: in a pipeline's folder, the folder itself, or downloaded."""
    from tonfa.checkpoint.files import resolve
    from tonfa.checkpoint.reading import exists, local_path

    local = local_path(model)
    if exists(local) and local.is_dir():
        return local / subfolder if (local / subfolder).is_dir() else local
    if exists(local) or model.strip("/").count("/") != 1:
        raise CheckpointError(f"MODEL: {model} is no folder here, nor a Hub id such as org/name")
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
