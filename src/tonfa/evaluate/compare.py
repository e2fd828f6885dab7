"""The comparison: the reference draws everything once, then every candidate answers and draws the same.

One transformer is needed at a time. What is kept of the reference lies on the host: its pictures and its trajectories,
about 50 MB a picture of 1024 x 1024 in 30 steps in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tonfa.errors import FormatError, UnsupportedError
from tonfa.evaluate.adherence import ColorTable, edge_scores, object_colors
from tonfa.evaluate.drawing import Settings, batches, control_image, draw
from tonfa.evaluate.layers import LayerError, LayerInputs, layer_errors
from tonfa.evaluate.lpips import Lpips
from tonfa.evaluate.problems import Problem
from tonfa.evaluate.similarity import psnr, ssim, to_unit
from tonfa.evaluate.statistics import Array, Estimate, estimate, geometric_mean, interval
from tonfa.evaluate.trajectory import Trajectory, recorded, velocity_errors
from tonfa.models.flux.plan import flux_dims, flux_plan
from tonfa.quantizer.planned import Reader

Advance = Callable[[], None]
"""Called after each step of a picture, each answer and each layer."""


@dataclass(frozen=True)
class Velocity:
    """Teacher-forced errors ||v' - v|| / ||v||."""

    overall: float
    """Geometric mean over the timesteps of the means over pictures."""
    low: float | None
    """Of the 95 % interval of `overall` over pictures; None for fewer than two."""
    high: float | None
    timesteps: tuple[float, ...]
    """From 1, all noise, to 0."""
    by_timestep: tuple[float, ...]
    """Means over pictures."""
    by_picture: tuple[float, ...]
    """Geometric means over timesteps."""


@dataclass(frozen=True)
class Adherence:
    """How well pictures follow depth map and prompt; None where no mask or no color is known."""

    silhouette_recall: Estimate | None
    silhouette_precision: Estimate | None
    silhouette_f1: Estimate | None
    color: Estimate | None
    """Share of objects whose color has the name that the prompt gives it; the mean over pictures that show objects."""
    objects: int
    """Scored by color."""


@dataclass(frozen=True)
class Comparison:
    """One candidate beside the reference."""

    name: str
    velocity: Velocity
    psnr: Estimate
    ssim: Estimate
    lpips: Estimate | None
    layers: tuple[LayerError, ...]
    adherence: Adherence | None
    pictures: Tensor  # (B, 3, H, W) uint8

    def as_dict(self) -> dict[str, Any]:
        """Everything but the pictures, ready for JSON."""
        content = {name: value for name, value in vars(self).items() if name not in ("pictures", "layers")}
        made = {name: value if isinstance(value, str | None) else asdict(value) for name, value in content.items()}
        return {**made, "layers": [asdict(layer) for layer in self.layers]}


class Evaluation:
    """The reference's pictures, trajectories and layer inputs, and what other transformers are compared with."""

    def __init__(
        self,
        pipe: Any,
        problems: Sequence[Problem],
        settings: Settings,
        *,
        seed: int = 0,
        lpips: Lpips | None = None,
        colors: ColorTable | None = None,
        keep_inputs: bool = True,
        on_step: Advance = lambda: None,
    ) -> None:
        """Draw every problem with the pipeline's own transformer, dense and from Diffusers. `seed` is the bootstrap's.

        `keep_inputs` collects what `layers` needs of the first batch.
        """
        if not problems:
            raise UnsupportedError("nothing to compare: no problem is given")
        self.pipe, self.problems, self.settings = pipe, list(problems), settings
        self.seed, self.lpips, self.colors = seed, lpips, colors
        self.masks = self._true_masks()
        for problem in self.problems:  # what cannot be read is said before anything is drawn
            control_image(problem, settings)
        reference = pipe.transformer
        self.plan = flux_plan(flux_dims(dict(reference.config)))
        self.inputs = LayerInputs(self.plan, settings.steps, seed) if keep_inputs else None
        self.trajectories: list[Trajectory] = []
        pictures = []
        for i, batch in enumerate(self._batches()):
            with ExitStack() as stack:
                self.trajectories.append(stack.enter_context(recorded(reference)))
                if self.inputs is not None and i == 0:
                    stack.enter_context(self.inputs.kept(reference))
                pictures.append(draw(pipe, batch, settings, on_step))
        self.pictures = torch.cat(pictures)
        self.adherence = self._adherence(self.pictures)

    def compare(
        self,
        name: str,
        transformer: nn.Module,
        reference: Reader | None = None,
        advance: Advance = lambda: None,
    ) -> Comparison:
        """Velocities, pictures and layers of a transformer on the pipeline's device, which the pipeline then keeps.

        `reference` holds the reference's weights by name; without it layers are left out. Raises FormatError, naming
        the candidate, for NaN or Inf.
        """
        try:
            velocity = self.velocity(transformer, advance)
            self.pipe.transformer = transformer
            drawn = [draw(self.pipe, b, self.settings, advance) for b in self._batches()]
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
        pictures = torch.cat(drawn)
        a, b = to_unit(pictures), to_unit(self.pictures)
        layers: list[LayerError] = []
        if reference is not None:
            layers = layer_errors(self.plan, reference, transformer, self.inputs, advance)
        return Comparison(
            name=name,
            velocity=velocity,
            psnr=estimate(psnr(a, b), self.seed),
            ssim=estimate(ssim(a, b), self.seed),
            lpips=None if self.lpips is None else estimate(self.lpips.distance(a, b), self.seed),
            layers=tuple(layers),
            adherence=self._adherence(pictures),
            pictures=pictures,
        )

    def velocity(self, transformer: nn.Module, advance: Advance = lambda: None) -> Velocity:
        """The answers of a transformer on the pipeline's device to what the reference was asked."""
        errors = [velocity_errors(transformer, t, self.pipe.device, advance) for t in self.trajectories]
        by_picture = torch.cat(errors, dim=1).T.numpy()  # (S, T)

        def overall(rows: Array) -> float:
            return geometric_mean(rows.mean(axis=0))

        low, high = interval(by_picture, overall, self.seed) or (None, None)
        return Velocity(
            overall=overall(by_picture),
            low=low,
            high=high,
            timesteps=tuple(call.timestep for call in self.trajectories[0].calls),
            by_timestep=tuple(by_picture.mean(axis=0).tolist()),
            by_picture=tuple(geometric_mean(row) for row in by_picture),
        )

    def steps_of_drawing(self) -> int:
        """How often `on_step` is called."""
        return len(list(self._batches())) * self.settings.steps

    def _batches(self) -> Iterator[Sequence[Problem]]:
        return batches(self.problems, self.settings.batch_size)

    def _true_masks(self) -> list[Tensor | None]:
        size = (self.settings.height, self.settings.width)
        masks = [problem.true_mask() for problem in self.problems]
        for problem, mask in zip(self.problems, masks, strict=True):
            if mask is not None and tuple(mask.shape) != size:
                found = f"{mask.shape[1]} x {mask.shape[0]}"
                raise FormatError(f"{problem.mask}: is {found}, the picture {size[1]} x {size[0]}")
        return masks

    def _adherence(self, pictures: Tensor) -> Adherence | None:
        known = [i for i, mask in enumerate(self.masks) if mask is not None]
        if not known:
            return None
        masks = torch.stack([mask for mask in self.masks if mask is not None])
        edges = {name: estimate(values, self.seed) for name, values in edge_scores(pictures[known], masks).items()}
        right: dict[int, list[bool]] = {}
        if self.colors is not None:
            table, names = self.colors, [self.problems[i].objects for i in known]
            found = object_colors(pictures[known], masks, map(len, names))
            labels = table.classify(torch.stack([o.feature for o in found])).tolist() if found else []
            for entry, label in zip(found, labels, strict=True):
                asked = names[entry.picture][entry.index]
                right.setdefault(entry.picture, []).append(table.names[label] == asked)
        shares = [sum(values) / len(values) for values in right.values()]
        return Adherence(
            silhouette_recall=edges["recall"],
            silhouette_precision=edges["precision"],
            silhouette_f1=edges["f1"],
            color=estimate(shares, self.seed) if shares else None,
            objects=sum(len(values) for values in right.values()),
        )
