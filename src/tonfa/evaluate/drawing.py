"""Drawing problems with a pipeline: the same noise for every transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.evaluate.problems import Problem
from tonfa.preprocess import open_rgb


@dataclass(frozen=True)
class Settings:
    """What all pictures have in common."""

    height: int
    width: int
    steps: int
    guidance: float
    max_sequence_length: int
    batch_size: int = 1


def batches(problems: Sequence[Problem], size: int) -> Iterator[Sequence[Problem]]:
    """So many at once."""
    for start in range(0, len(problems), size):
        yield problems[start : start + size]


def control_image(problem: Problem, settings: Settings) -> Image.Image | None:
    """The control image in RGB at the size that is drawn. Raises CheckpointError for what is no complete picture."""
    if problem.control is None:
        return None
    picture = open_rgb(problem.control)
    size = (settings.width, settings.height)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def draw(
    pipe: Any,
    problems: Sequence[Problem],  # one batch
    settings: Settings,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:  # (B, 3, H, W) uint8
    """The pictures, as they would be saved. Each has its own CPU generator, so they do not depend on their batch.

    Raises FormatError for NaN or Inf.
    """

    def stepped(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    controls = [control_image(problem, settings) for problem in problems]
    pictures = pipe(
        prompt=[problem.prompt for problem in problems],
        height=settings.height,
        width=settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=[torch.Generator("cpu").manual_seed(problem.seed) for problem in problems],
        max_sequence_length=settings.max_sequence_length,
        callback_on_step_end=stepped,
        output_type="pt",
        **({} if None in controls else {"control_image": controls}),
    ).images
    if not torch.isfinite(pictures).all():
        raise FormatError("a picture holds NaN or Inf; try --dtype bfloat16 or float32")
    return (pictures.float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
