"""`tonfa evaluate`: how near quantized transformers come to a dense one, in the same pipeline from the same noise."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tonfa.cli.console import duration, progress, stderr
from tonfa.cli.failures import Debug, command
from tonfa.cli.images import check_side, nearest_multiple, open_image, write_image
from tonfa.cli.options import (
    HIGHEST_GUIDANCE,
    LONGEST_TEXT,
    ActivationsOption,
    DeviceOption,
    DtypeOption,
    check_seed,
    parse_device,
    parse_dtype,
)
from tonfa.errors import CheckpointError, UnsupportedError
from tonfa.models.flux.guidance import choose_guidance

if TYPE_CHECKING:
    from tonfa.cli.pipeline import Placement
    from tonfa.evaluate.compare import Comparison, Evaluation
    from tonfa.evaluate.lpips import Lpips
    from tonfa.evaluate.problems import Problem

SCHEMA = 1
SHEET_ROWS = 16
"""Problems that a contact sheet shows."""
WORST = 5
"""Layers that the summary names of each candidate."""
INPUTS = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds")
LAYERS = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim")
"""What of two transformers' configurations has to agree for one pipeline, and for one table of layers."""


@command(interrupted="nothing was written")
def evaluate(
    model: Annotated[str, typer.Argument(help="FLUX pipeline: a Diffusers folder or a Hub id.")],
    transformer: Annotated[
        list[str],
        typer.Option(help="Candidate: a 4-bit checkpoint or a dense Diffusers folder; may be repeated."),
    ],
    prompts: Annotated[
        Path, typer.Option(help="A prompt a line, or a JSON list of prompts with control images, masks and seeds.")
    ],
    control_images: Annotated[
        Path | None, typer.Option(help="Folder of depth maps, one a prompt in the order of their names.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="Dense transformer that is compared with.", show_default="the model's own"),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Pictures; more than prompts go round them.", show_default="one a prompt")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, max=HIGHEST_GUIDANCE, help="Guidance scale.", show_default="10 with control, else 3.5"),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Multiple of 16.", show_default="the first control image's, else the model's")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Multiple of 16.", show_default="the first control image's, else the model's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first prompt's noise; the next has seed + 1.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 1,
    max_sequence_length: Annotated[int, typer.Option(min=1, max=LONGEST_TEXT, help="Prompt length in tokens.")] = 512,
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Measure every layer.")] = True,
    lpips_backbone: Annotated[
        Path | None, typer.Option(help="AlexNet's weights, for LPIPS: torchvision's names, safetensors.")
    ] = None,
    lpips_heads: Annotated[Path | None, typer.Option(help="LPIPS's linear heads for AlexNet, safetensors.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "bfloat16",
    activations: ActivationsOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures to this file.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet to this file.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the tables alone.")] = False,
    debug: Debug = False,
) -> None:
    """Compare transformers with a dense one: velocities, pictures, layers, adherence to depth map and prompt.

    The reference draws every prompt once. Each candidate then answers the same questions (teacher-forced velocities)
    and draws the same pictures from the same noise. Tables go to stdout; docs/evaluation.md says what they mean.

    Example:

    ```
    tonfa evaluate black-forest-labs/FLUX.1-Depth-dev --transformer flux-depth-int4 \\
      --prompts prompts.json --samples 16 --json figures.json --sheet sheet.png
    ```
    """
    if (lpips_backbone is None) != (lpips_heads is None):
        raise typer.BadParameter("give both or none", param_hint="--lpips-backbone / --lpips-heads")
    check_seed(seed, samples or 1)
    check_side(height, "--height")
    check_side(width, "--width")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise typer.BadParameter(f"{sheet.name}: the name must end with .png", param_hint="--sheet")
    console = stderr(quiet)
    for option, file in (("--json", json_file), ("--sheet", sheet)):
        if file is not None:
            _check_writable(file, option)

    from tonfa.checkpoint.atomic import write_json
    from tonfa.cli.evaluate_tables import print_comparisons
    from tonfa.cli.pipeline import Placement, assemble, quieten_libraries, to_device

    quieten_libraries()
    from tonfa.dispatch import bind
    from tonfa.evaluate.compare import Evaluation
    from tonfa.evaluate.drawing import Settings
    from tonfa.evaluate.problems import read_colors, read_problems

    place = parse_device(device)
    if activations is not None:
        bind(place, activations)  # says what is missing before anything is loaded
    placement = Placement(place, parse_dtype(dtype), activations, False)
    problems = read_problems(prompts, control_images=control_images, samples=samples, seed=seed)
    colors = read_colors(prompts) if any(problem.objects for problem in problems) else None
    dense = _dense_folder(model, reference)
    control = _check_models(model, dense, transformer, problems, activations, layers)
    lpips = _lpips(lpips_backbone, lpips_heads)

    started = time.perf_counter()
    pipe = assemble(model, {"transformer": load_candidate(str(dense), placement)}, control, placement)
    pipe = to_device(pipe, placement)
    default_height, default_width = _default_size(pipe, problems[0])
    settings = Settings(
        height or default_height,
        width or default_width,
        steps,
        choose_guidance(guidance, control),
        max_sequence_length,
        batch_size,
    )
    console.print(f"model        {model} ({type(pipe).__name__})")
    console.print(f"reference    {dense}")
    console.print(f"device       {placement.device}, {dtype}")
    size = f"{settings.width} x {settings.height}"
    console.print(f"pictures     {len(problems)} of {size}, {steps} steps, guidance {settings.guidance:g}")
    with progress(console) as bar:
        batches = -(-len(problems) // batch_size)
        task = bar.add_task("reference", total=batches * steps, note="")
        evaluation = Evaluation(
            pipe,
            problems,
            settings,
            seed=seed,
            lpips=lpips,
            colors=colors,
            keep_inputs=layers,
            on_step=lambda: bar.advance(task),
        )
        comparisons = [
            _compare(evaluation, name, dense if layers else None, placement, bar) for name in dict.fromkeys(transformer)
        ]
    if json_file is not None:
        write_json(json_file, _figures(model, dense, evaluation, comparisons, placement))
    if sheet is not None:
        write_image(_sheet(evaluation, comparisons), sheet)
    print_comparisons(evaluation, comparisons, WORST)
    console.print(f"done in {duration(time.perf_counter() - started)}")


def load_candidate(source: str, placement: Placement) -> Any:
    """A dense transformer of a local folder, or a 4-bit one of any container, on its device."""
    from tonfa.cli.pipeline import load_transformer
    from tonfa.models.flux.audit import is_dense

    if not is_dense(Path(source)):
        return load_transformer(source, placement).to(placement.device)
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(source, dtype=placement.dtype).to(placement.device).eval()


def _dense_folder(model: str, reference: str | None) -> Path:
    """Where the reference's weights are. Raises CheckpointError where they are not dense."""
    from tonfa.checkpoint.reading import local_path
    from tonfa.cli.quantize import find_transformer
    from tonfa.cli.sources import read_json
    from tonfa.models.flux.audit import is_dense

    if read_json(model, "model_index.json", "MODEL") is None:
        raise CheckpointError(f"MODEL: {model} has no model_index.json, so it is no pipeline of Diffusers")
    if reference is None:
        folder = find_transformer(model, "transformer")
        remedy = "name a dense one with --reference"
    else:
        folder = local_path(reference)
        remedy = "give a folder with a 16-bit FluxTransformer2DModel"
    if not is_dense(folder):
        raise CheckpointError(f"{folder}: holds no dense transformer of FLUX to compare with; {remedy}")
    return folder


def _check_models(
    model: str,
    dense: Path,
    candidates: Sequence[str],
    problems: Sequence[Problem],
    activations: str | None,
    layers: bool,
) -> bool:
    """Whether the models take control images, which all have to agree on, and have to get."""
    from tonfa.checkpoint.reading import read_json
    from tonfa.cli import sources
    from tonfa.cli.pipeline import examine, takes_control
    from tonfa.models.flux.audit import is_dense

    reference = read_json(dense / "config.json")
    control = takes_control(reference)
    own = sources.read_json(model, "transformer/config.json", "MODEL")
    if own is not None:
        _check_alike(f"--reference: {dense}", reference, INPUTS, "the pipeline's own transformer", own)
    quantized = False
    for name in candidates:
        if is_dense(Path(name)):
            config: Mapping[str, Any] = read_json(Path(name) / "config.json")
        else:
            config, quantized = examine(model, name).config, True
        takes = takes_control(config)
        if takes != control:
            kinds = ("text-to-image", "control")
            raise UnsupportedError(f"{name} is a {kinds[takes]} transformer, the reference a {kinds[control]} one")
        _check_alike(name, config, INPUTS, "the reference", reference)
        if layers:
            _check_alike(name, config, LAYERS, "the reference", reference, "; add --no-layers to compare the rest")
    if activations is not None and not quantized:
        raise typer.BadParameter("no --transformer is quantized", param_hint="--activations")
    without = [problem.prompt for problem in problems if (problem.control is not None) != control]
    if without and control:
        raise UnsupportedError(f"the model reads control images, and there is none for {without[0]!r}")
    if without:
        raise UnsupportedError(f"the model reads no control images; leave that of {without[0]!r} out")
    return control


def _check_alike(
    name: str, config: Mapping[str, Any], keys: Sequence[str], other: str, known: Mapping[str, Any], remedy: str = ""
) -> None:
    """Raise UnsupportedError where two configurations that both name a key differ in it."""
    for key in keys:
        if key in config and key in known and config[key] != known[key]:
            raise UnsupportedError(f"{name} has {key} {config[key]}, {other} {known[key]}{remedy}")


def _default_size(pipe: Any, problem: Problem) -> tuple[int, int]:
    """Height and width of the control image, rounded to what the model can draw, else the model's own."""
    if problem.control is None:
        side = pipe.default_sample_size * pipe.vae_scale_factor
        return side, side
    picture = open_image(problem.control, "--prompts")
    return nearest_multiple(picture.height), nearest_multiple(picture.width)


def _lpips(backbone: Path | None, heads: Path | None) -> Lpips | None:
    if backbone is None or heads is None:
        return None
    from tonfa.evaluate.lpips import Lpips

    return Lpips.from_files(backbone, heads)


def _compare(evaluation: Evaluation, name: str, dense: Path | None, placement: Placement, bar: Any) -> Comparison:
    from tonfa.checkpoint.tensors import TensorFolder

    count = len(list(evaluation.plan.linears())) if dense is not None else 0
    task = bar.add_task(Path(name).name, total=2 * evaluation.steps_of_drawing() + count, note="")
    evaluation.pipe.transformer = None  # of two transformers at a time, one would only take memory
    candidate = load_candidate(name, placement)
    weights = None if dense is None else TensorFolder(dense)
    return evaluation.compare(name, candidate, weights, lambda: bar.advance(task))


def _figures(
    model: str, dense: Path, evaluation: Evaluation, comparisons: Sequence[Comparison], placement: Placement
) -> dict[str, Any]:
    from tonfa.bench.protocol import environment
    from tonfa.dispatch import default_activations

    problems = [{"prompt": p.prompt, "seed": p.seed, "control_image": p.control and p.control.name} for p in
                evaluation.problems]  # fmt: skip
    return {
        "schema": SCHEMA,
        "model": model,
        "reference": str(dense),
        "settings": {
            **asdict(evaluation.settings),
            "dtype": str(placement.dtype).removeprefix("torch."),
            "activations": placement.activations or default_activations(placement.device),
            "bootstrap_seed": evaluation.seed,
        },
        "problems": problems,
        "reference_adherence": evaluation.adherence and asdict(evaluation.adherence),
        "candidates": [comparison.as_dict() for comparison in comparisons],
        **environment(placement.device),
    }


def _check_writable(file: Path, option: str) -> None:
    """Raise before anything is drawn if the file cannot be written."""
    if file.is_dir():
        raise UnsupportedError(f"{option}: {file} is a folder; name a file")
    if not file.absolute().parent.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise UnsupportedError(f"{option}: there is no folder {file.parent} that can be written to")


def _sheet(evaluation: Evaluation, comparisons: Sequence[Comparison]) -> Any:
    from tonfa.cli.evaluate_tables import short_names
    from tonfa.evaluate.drawing import control_image
    from tonfa.evaluate.sheet import GAIN, Row, contact_sheet, difference, to_pil

    control = evaluation.problems[0].control is not None
    titles = ["control"] * control + ["reference"]
    for name in short_names(comparisons):
        titles += [name, f"difference x {GAIN}"]
    rows = []
    for i, problem in enumerate(evaluation.problems[:SHEET_ROWS]):
        drawn = to_pil(evaluation.pictures[i])
        pictures = [control_image(problem, evaluation.settings)] * control + [drawn]
        for comparison in comparisons:
            other = to_pil(comparison.pictures[i])
            pictures += [other, difference(drawn, other)]
        rows.append(Row(problem.prompt, tuple(pictures)))
    return contact_sheet(titles, rows)
