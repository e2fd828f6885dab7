"""`tonfa generate`: pictures from a prompt and a depth map."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tonfa.cli.console import duration, progress, stderr
from tonfa.cli.failures import Debug, command
from tonfa.cli.images import LARGEST, check_side, nearest_multiple, open_image, output_paths, write_image
from tonfa.cli.options import (
    HIGHEST_GUIDANCE,
    LONGEST_TEXT,
    ActivationsOption,
    AttentionOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    check_offload,
    check_seed,
    parse_device,
    parse_dtype,
)
from tonfa.errors import UnsupportedError
from tonfa.models.flux.guidance import choose_guidance

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console

    from tonfa.cli.pipeline import Placement

MEMORY_REMEDY = "draw smaller with --width and --height, fewer at once with --batch-size, or add --offload on a GPU"


@command(interrupted="pictures that were finished are kept")
def generate(
    model: Annotated[str, typer.Argument(help="FLUX pipeline: a Diffusers folder or a Hub id.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to draw.")],
    transformer: Annotated[
        str | None,
        typer.Option(
            help="4-bit checkpoint: a folder, a .safetensors file or a Hub id.", show_default="the model's own"
        ),
    ] = None,
    control_image: Annotated[Path | None, typer.Option(help="Depth map: near is white.")] = None,
    image: Annotated[Path | None, typer.Option(help="Photograph whose depth is estimated first.")] = None,
    depth_model: Annotated[
        str, typer.Option(help="Estimates the depth of --image.")
    ] = "LiheYoung/depth-anything-large-hf",
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 30,
    guidance: Annotated[
        float | None,
        typer.Option(min=0, max=HIGHEST_GUIDANCE, help="Guidance scale.", show_default="10 with control, else 3.5"),
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Multiple of 16.", show_default="the control image's, else the model's")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Multiple of 16.", show_default="the control image's, else the model's")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture; the next has seed + 1.")] = 0,
    num_images: Annotated[int, typer.Option(min=1, help="Pictures to draw.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 1,
    max_sequence_length: Annotated[int, typer.Option(min=1, max=LONGEST_TEXT, help="Prompt length in tokens.")] = 512,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "bfloat16",
    activations: ActivationsOption = None,
    attention: AttentionOption = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="PATH", help="File, or folder for image.png.")
    ] = "out.png",
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the GPU only the part that is running.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the paths of the pictures alone.")] = False,
    debug: Debug = False,
) -> None:
    """Draw pictures with a FLUX pipeline and a 4-bit transformer.

    Paths of the finished pictures go to stdout, everything else to stderr. The same seed gives the same picture on the
    same machine.

    Example:

    ```
    tonfa generate black-forest-labs/FLUX.1-Depth-dev \\
      --transformer flux-depth-int4 --image photo.jpg \\
      --prompt "a robot made of candy" --output robot.png
    ```
    """
    if not prompt.strip():
        raise typer.BadParameter("the prompt is empty", param_hint="--prompt")
    if control_image is not None and image is not None:
        raise typer.BadParameter("give one of them", param_hint="--control-image / --image")
    check_seed(seed, num_images)
    check_side(height, "--height")
    check_side(width, "--width")
    console = stderr(quiet)
    paths = output_paths(output, num_images)

    from tonfa.cli.pipeline import Settings, StepClock, describe_transformer, draw, examine, load
    from tonfa.quantizer.memory import enough_memory

    placement = _placement(device, dtype, activations, attention, offload)
    facts = examine(model, transformer)
    for option, value in (("--activations", activations), ("--attention", attention)):
        if value is not None and not facts.is_quantized:
            raise typer.BadParameter("the transformer is not quantized; name a 4-bit --transformer", param_hint=option)
    source = control_image or image
    if facts.takes_control and source is None:
        raise typer.BadParameter("the transformer is a control model: give one", param_hint="--control-image / --image")
    if source is not None and not facts.takes_control:
        raise typer.BadParameter(
            "the transformer reads no control image; leave it out", param_hint="--control-image / --image"
        )
    control = None if source is None else open_image(source, "--image" if image else "--control-image")
    if image is not None and control is not None:
        control = _estimate_depth(control, depth_model, placement, console)

    started = time.perf_counter()
    pipe = load(model, transformer, facts.takes_control, placement)
    default = pipe.default_sample_size * pipe.vae_scale_factor
    height, width = _size(height, width, control, default, console)
    guidance = choose_guidance(guidance, facts.takes_control)
    console.print(f"model        {model} ({type(pipe).__name__})")
    console.print(f"transformer  {transformer or 'its own'}: {describe_transformer(pipe.transformer, placement)}")
    console.print(f"device       {placement.device}, {dtype}{', offloading' if offload else ''}")
    console.print(f"picture      {width} x {height}, {steps} steps, guidance {guidance:g}, seed {seed}")
    console.print(f"loaded in {duration(time.perf_counter() - started)}")

    settings = Settings(prompt, height, width, steps, guidance, max_sequence_length, control)
    started = time.perf_counter()
    batches = -(-num_images // batch_size)
    with progress(console) as bar, enough_memory(f"drawing {width} x {height} pixels", MEMORY_REMEDY):
        task = bar.add_task("denoising", total=batches * steps, note="")
        seeds = list(range(seed, seed + num_images))
        clock = StepClock(lambda: bar.advance(task))
        pictures = draw(pipe, settings, seeds, batch_size, clock)
        for path, picture in zip(paths, pictures, strict=True):
            write_image(picture, path)
            print(path, flush=True)
    total = duration(time.perf_counter() - started)
    console.print(f"{num_images} picture{'s' * (num_images > 1)} in {total}, {duration(clock.median)} a step")


def _placement(device: str, dtype: Dtype, activations: str | None, attention: str | None, offload: bool) -> Placement:
    from tonfa.cli.pipeline import Placement
    from tonfa.dispatch import bind, bind_attention

    place = parse_device(device)
    check_offload(offload, place)
    if activations is not None:
        bind(place, activations)  # says what is missing before anything is loaded
    if attention is not None:
        bind_attention(place, attention)
    return Placement(place, parse_dtype(dtype), activations, offload, attention)


def _estimate_depth(photograph: Image, depth_model: str, placement: Placement, console: Console) -> Image:
    from tonfa.preprocess import DepthPreprocessor

    started = time.perf_counter()
    processor = DepthPreprocessor.from_pretrained(depth_model).to(placement.device)
    depth: Image = processor(photograph)[0].convert("RGB")
    console.print(f"depth        {depth_model}, {duration(time.perf_counter() - started)}")
    return depth


def _size(
    height: int | None, width: int | None, control: Image | None, default: int, console: Console
) -> tuple[int, int]:
    """Height and width: as asked, else the control image's rounded to what the model can draw, else the model's."""
    if control is None:
        return height or default, width or default
    chosen = height or nearest_multiple(control.height), width or nearest_multiple(control.width)
    if max(chosen) > LARGEST:
        raise UnsupportedError(
            f"the control image is {control.width} x {control.height}, and at most {LARGEST} pixels a side are drawn; "
            "choose a size with --width and --height"
        )
    if chosen != (control.height, control.width):
        console.print(
            f"the control image is {control.width} x {control.height}: it is scaled to {chosen[1]} x {chosen[0]}"
        )
    return chosen
