"""A FLUX pipeline as the source of a calibration: samples drawn into a folder, then walked over block by block."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tonfa.models.flux.plan import flux_dims, flux_plan
from tonfa.models.flux.sampling import Picture, Schedule, draw
from tonfa.models.flux.walk import FluxWalk, Report
from tonfa.plan import ModelPlan
from tonfa.quantizer.calibration import TOKENS_PER_CHANNEL
from tonfa.quantizer.memory import check_host_memory, enough_memory
from tonfa.quantizer.recipe import Recipe
from tonfa.quantizer.samples import Samples

SAMPLING = "sampling"
"""What a report calls the drawing of pictures."""
_SMALL = 4096
"""Values of a sample besides the two streams: pooled text, the file's header."""
PATCH = 16
"""Pixels of a picture's side that one token of the image stream stands for."""


def image_tokens(height: int, width: int) -> int:
    """L_img of a picture."""
    return (height // PATCH) * (width // PATCH)


def samples_needed(plan: ModelPlan, tokens: int, per_channel: int = TOKENS_PER_CHANNEL) -> int:
    """How many calls with `tokens` in their shorter stream give each channel of the widest input `per_channel`."""
    widest = max((linear.in_features for linear in plan.linears() if linear.kind == "svdq"), default=0)
    return -(-per_channel * widest // tokens)


@dataclass(frozen=True)
class FluxCalibration:
    """`quantizer.calibration.Calibration` of a FLUX pipeline."""

    config: Mapping[str, Any]
    pictures: tuple[Picture, ...]
    schedule: Schedule
    load: Callable[[], Any]
    """The 16-bit pipeline on its device; called only if samples are missing."""
    pipeline: str
    """Changes with the pipeline's files."""
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    sequential: bool = False
    report: Report | None = field(default=None, compare=False)

    @property
    def count(self) -> int:
        """Samples in all."""
        return sum(len(picture.steps) for picture in self.pictures)

    def identity(self) -> dict[str, Any]:
        """See the protocol; prompts and control images by their hashes."""
        texts, images, sizes = hashlib.sha256(), hashlib.sha256(), set()
        for picture in self.pictures:
            texts.update(f"{picture.prompt}\n{picture.seed} {picture.steps}\n".encode())
            sizes.add(f"{picture.height}x{picture.width}")
            if picture.control is not None:
                images.update(f"{picture.control.size} ".encode() + picture.control.tobytes())
        control = any(picture.control is not None for picture in self.pictures)
        return {
            "samples": self.count,
            "prompts": texts.hexdigest(),
            "control images": images.hexdigest() if control else None,
            "sizes": sorted(sizes),
            "steps": self.schedule.steps,
            "guidance": self.schedule.guidance,
            "text tokens": self.schedule.text_tokens,
            "sequential": self.sequential,
            "pipeline": self.pipeline,
        }

    def nbytes(self) -> int:
        """What the samples take on the disk: for FLUX at 1024 x 1024 5.3 MB each."""
        text = self.schedule.text_tokens * int(self.config.get("joint_attention_dim", 4096))
        channels = int(self.config.get("in_channels", 64))
        values = sum(len(p.steps) * (text + channels * image_tokens(p.height, p.width) + _SMALL) for p in self.pictures)
        return values * self.dtype.itemsize

    def host_bytes(self) -> int:
        """What the hidden states of all samples take on the host while blocks are quantized."""
        hidden = flux_dims(self.config).hidden_size
        tokens = sum(
            len(p.steps) * (self.schedule.text_tokens + image_tokens(p.height, p.width)) for p in self.pictures
        )
        return tokens * hidden * self.dtype.itemsize

    def open(self, folder: Path) -> FluxWalk:
        """Draw the pictures whose samples are missing, then let go of the pipeline."""
        check_host_memory(self.host_bytes(), f"the hidden states of {self.count} samples", "lower --samples or --size")
        samples = Samples(folder, self.count)
        missing = [p for p in self.pictures if not all(samples.has(p.first + i) for i in range(len(p.steps)))]
        if missing:
            self._draw(missing, samples)
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return FluxWalk(
            self.config,
            flux_plan(flux_dims(self.config)),
            samples,
            rank=self.recipe.rank,
            activations=self.recipe.activations,
            device=self.device,
            dtype=self.dtype,
            report=self.report,
        )

    def _draw(self, missing: list[Picture], samples: Samples) -> None:
        """Draw pictures; the pipeline lives only in here."""
        total, done = sum(picture.steps[-1] + 1 for picture in missing), 0

        def on_step() -> None:
            nonlocal done
            done += 1
            if self.report is not None:
                self.report(SAMPLING, done, total)

        with enough_memory("drawing the calibration's pictures", "lower --size", "add --offload, or lower --size"):
            pipe = self.load()
            for picture in missing:
                draw(pipe, picture, self.schedule, samples, on_step)
