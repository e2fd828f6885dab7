"""What `tonfa quantize --calibrate` is given: prompts, control images and numbers, checked before a model is loaded."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tonfa.cli.images import MULTIPLE, nearest_multiple, open_image
from tonfa.cli.options import LONGEST_TEXT
from tonfa.errors import CheckpointError, UnsupportedError
from tonfa.models.flux.guidance import choose_guidance

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from tonfa.models.flux.calibration import FluxCalibration
    from tonfa.models.flux.walk import Report
    from tonfa.quantizer.recipe import Recipe

OWN = "default"
"""Names the captions and the depth maps that come with tonfa."""
DATA = Path(__file__).parents[1] / "data"
LEAST_SAMPLES = 32
GENEROUS = 2
"""Samples are drawn by default for this many times the tokens that the widest layer needs."""
STORED = 4
"""Steps of a picture that are stored. With 32 samples of the demo model, 6 of as many fewer pictures raise its error by
2 to 5 %; 20 steps a picture do as well as 30."""
LONGEST_TEXT_DISTILLED = 256
"""T5 tokens of models without a guidance embedding (FLUX.1-schnell), which were trained so."""
STEPS, DISTILLED_STEPS = 20, 4


@dataclass(frozen=True)
class Request:
    """What the command line says; None leaves a choice to the model."""

    model: str
    prompts: str
    control_images: str | None
    samples: int | None
    steps: int | None
    guidance: float | None
    size: int | None
    sequential: bool
    offload: bool
    force: bool


def read_prompts(source: str) -> list[str]:
    """One prompt a line, empty lines left out. Raises CheckpointError for what is no text, or none."""
    path = DATA / "captions.txt" if source == OWN else Path(source)
    if not path.is_file():
        raise CheckpointError(f"--calibrate: no file {path}; give a text file with a prompt a line, or `{OWN}`")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"--calibrate: {path} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    for number, prompt in enumerate(prompts, 1):
        if any(unicodedata.category(c) == "Cc" and c != "\t" for c in prompt):
            raise CheckpointError(f"--calibrate: {path} is no text: prompt {number} holds control characters")
    if not prompts:
        raise CheckpointError(f"--calibrate: {path} holds no prompts; it needs one a line")
    return prompts


def read_control_images(source: str) -> list[Image]:
    """All pictures of a folder, in the order of their names. Raises CheckpointError for anything else in it."""
    folder = DATA / "depth" if source == OWN else Path(source)
    if not folder.is_dir():
        raise CheckpointError(f"--control-images: no folder {folder}; give a folder of pictures, or `{OWN}`")
    paths = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    if not paths:
        raise CheckpointError(f"--control-images: {folder} is empty")
    return [open_image(path, "--control-images") for path in paths]


def build(
    request: Request,
    config: Mapping[str, Any],
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    report: Report,
) -> FluxCalibration:
    """The calibration that was asked for. Reads the pipeline's configuration, the prompts and the control images.

    Raises CheckpointError where they cannot be used, UnsupportedError for too few of them without `force`.
    """
    from tonfa.cli.pipeline import Placement, load, quieten_libraries
    from tonfa.models.flux.calibration import FluxCalibration, image_tokens, samples_needed
    from tonfa.models.flux.plan import flux_dims, flux_plan
    from tonfa.models.flux.sampling import Schedule, choose_pictures

    takes_control = _takes_control(request)
    prompts, controls = read_prompts(request.prompts), _controls(request, takes_control)
    size = _sizes(request)
    dims = flux_dims(config)
    guided = dims.guidance_embeds
    schedule = Schedule(
        request.steps or (STEPS if guided else DISTILLED_STEPS),
        choose_guidance(request.guidance, takes_control),
        LONGEST_TEXT if guided else LONGEST_TEXT_DISTILLED,
    )
    sizes = [size(control) for control in controls] or [size(None)]
    smallest = min(image_tokens(*sides) for sides in sizes)
    needed = samples_needed(flux_plan(dims), min(smallest, schedule.text_tokens))
    count = request.samples or max(LEAST_SAMPLES, GENEROUS * needed)
    stored = min(STORED, schedule.steps)
    pictures = -(-count // stored)
    if not request.force:
        if count < needed:
            raise UnsupportedError(
                f"--samples {count}: the widest layer of this model needs at least {needed} at this size; "
                "draw more, draw larger pictures with --size, or add --force"
            )
        if len(prompts) < pictures:
            raise UnsupportedError(
                f"--calibrate: {request.prompts} has {len(prompts)} prompts, {count} samples take {pictures} "
                f"({stored} steps of each picture); add prompts, or add --force to use some again with other seeds"
            )

    def load_pipeline() -> Any:
        pipe = load(request.model, None, takes_control, Placement(device, dtype, None, request.offload))
        quieten_libraries()  # a caption that CLIP cuts is as good a sample as any
        return pipe

    return FluxCalibration(
        config,
        choose_pictures(
            prompts, controls, size, samples=count, steps=schedule.steps, per_picture=stored, seed=recipe.seed
        ),
        schedule,
        load_pipeline,
        _pipeline_identity(request.model),
        recipe,
        device,
        dtype,
        request.sequential,
        report,
    )


def _takes_control(request: Request) -> bool:
    from tonfa.cli.pipeline import examine
    from tonfa.cli.sources import read_json

    if read_json(request.model, "model_index.json", "MODEL") is None:
        raise CheckpointError(
            f"--calibrate: {request.model} has no model_index.json, so it is no pipeline of Diffusers, and a "
            "transformer alone cannot draw the pictures that are sampled; give the whole pipeline, or leave out "
            "--calibrate"
        )
    return examine(request.model, None).takes_control


def _controls(request: Request, takes_control: bool) -> list[Image]:
    given = request.control_images
    if not takes_control:
        if given is not None:
            raise typer.BadParameter("the transformer reads no control image", param_hint="--control-images")
        return []
    if given is None and request.prompts != OWN:
        raise typer.BadParameter(
            f"the transformer is a control model: give a folder of control images, or `{OWN}` for the depth maps that "
            "come with tonfa",
            param_hint="--control-images",
        )
    return read_control_images(given or OWN)


def _sizes(request: Request) -> Callable[[Image | None], tuple[int, int]]:
    """Height and width of a picture: --size, else those of a control image of the user's, else what the VAE is for."""
    from tonfa.cli.sources import read_json

    if request.size is not None:
        side = request.size
    else:
        vae = read_json(request.model, "vae/config.json", "MODEL") or {}
        side = nearest_multiple(int(vae.get("sample_size") or 1024))
    own = request.control_images in (None, OWN)

    def size(control: Image | None) -> tuple[int, int]:
        if control is None or own or request.size is not None:
            return side, side
        return nearest_multiple(control.height), nearest_multiple(control.width)

    assert side % MULTIPLE == 0
    return size


def _pipeline_identity(model: str) -> str:
    """Changes with the name, size or time of any file of a local pipeline; of the Hub's, its id."""
    from tonfa.checkpoint.reading import exists, local_path

    local = local_path(model)
    if not (exists(local) and local.is_dir()):
        return model
    found = hashlib.sha256()
    for path in sorted(p for p in local.rglob("*") if p.suffix in (".json", ".safetensors") and p.is_file()):
        stat = path.stat()
        found.update(f"{path.relative_to(local)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return found.hexdigest()
