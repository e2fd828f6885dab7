"""Pictures drawn by a 16-bit FLUX pipeline, for the inputs of the transformer's calls on the way.

Of each picture some steps are stored, drawn evenly from all: one from each of as many equal spans of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from tonfa.errors import FormatError, UnsupportedError
from tonfa.quantizer.samples import Samples

INPUTS = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance")
"""Of the transformer; the last is not given to models without a guidance embedding."""


@dataclass(frozen=True)
class Picture:
    """One picture, and the steps of it that are stored as samples `first`, `first` + 1, ..."""

    prompt: str
    control: Image.Image | None
    height: int
    width: int
    seed: int
    steps: tuple[int, ...]
    first: int


@dataclass(frozen=True)
class Schedule:
    """What all pictures have in common."""

    steps: int
    guidance: float
    text_tokens: int


def choose_pictures(
    prompts: Sequence[str],
    controls: Sequence[Image.Image],
    size: Callable[[Image.Image | None], tuple[int, int]],
    *,
    samples: int,
    steps: int,
    per_picture: int,
    seed: int,
) -> tuple[Picture, ...]:
    """As many pictures as `samples` take at `per_picture` stored steps of `steps` each.

    Prompts and control images are shuffled, and used again, with other seeds, where there are too few. `size` tells a
    picture's height and width.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffled(count: int, needed: int) -> list[int]:
        rounds = -(-needed // count)
        return [i for _ in range(rounds) for i in torch.randperm(count, generator=generator).tolist()][:needed]

    count = -(-samples // per_picture)
    texts = shuffled(len(prompts), count)
    images = shuffled(len(controls), count) if controls else []
    pictures = []
    for i in range(count):
        stored = min(per_picture, samples - i * per_picture)
        edges = [steps * j // stored for j in range(stored + 1)]
        chosen = (int(torch.randint(a, b, (), generator=generator)) for a, b in pairwise(edges))
        control = controls[images[i]] if controls else None
        height, width = size(control)
        own_seed = (seed * 1_000_003 + i) % 2**63  # PyTorch's generators take no larger ones
        pictures.append(Picture(prompts[texts[i]], control, height, width, own_seed, tuple(chosen), i * per_picture))
    return tuple(pictures)


@torch.no_grad()
def draw(pipe: Any, picture: Picture, schedule: Schedule, samples: Samples, on_step: Callable[[], None]) -> None:
    """Draw a picture up to its last stored step, storing the transformer's inputs; the latents are not decoded.

    Raises FormatError, naming the layer, as soon as a step's output holds NaN or Inf.
    """
    calls = 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args or kwargs.get("joint_attention_kwargs"):
            raise UnsupportedError("calibration: this pipeline calls its transformer with inputs that cannot be stored")
        if calls in picture.steps:
            inputs = {name: kwargs[name] for name in INPUTS if kwargs.get(name) is not None}
            samples.write(picture.first + picture.steps.index(calls), _stored(inputs))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal calls
        calls += 1
        if not torch.isfinite(output[0]).all():
            raise _not_finite(module, kwargs, hooks)

    def ended(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        pipe._interrupt = step >= picture.steps[-1]
        return tensors

    control = {} if picture.control is None else {"control_image": picture.control}
    hooks = [
        pipe.transformer.register_forward_pre_hook(before, with_kwargs=True),
        pipe.transformer.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        pipe(
            prompt=picture.prompt,
            height=picture.height,
            width=picture.width,
            num_inference_steps=schedule.steps,
            guidance_scale=schedule.guidance,
            generator=torch.Generator("cpu").manual_seed(picture.seed),
            max_sequence_length=schedule.text_tokens,
            callback_on_step_end=ended,
            output_type="latent",
            **control,
        )
    finally:
        for hook in hooks:
            hook.remove()


def _stored(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the host; position ids without a batch dimension, which old pipelines add."""
    ids = {name: inputs[name][0] for name in ("img_ids", "txt_ids") if inputs[name].ndim == 3}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in {**inputs, **ids}.items()}


def _not_finite(transformer: nn.Module, kwargs: dict[str, Any], hooks: Sequence[Any]) -> FormatError:
    """The first layer of a call whose output holds NaN or Inf, found by running the call again."""
    found: list[FormatError] = []
    for hook in hooks:
        hook.remove()

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if found or not isinstance(output, Tensor) or bool(torch.isfinite(output).all()):
                return
            damaged = [n for n, p in module.named_parameters() if not torch.isfinite(p).all()]
            if damaged:
                text = f"{name}.{damaged[0]}: holds NaN or Inf; the source is damaged or of a wider dtype"
            else:
                dtype = str(output.dtype).removeprefix("torch.")
                text = f"{name}: its output holds NaN or Inf in {dtype}; the model overflows, try bfloat16 or float32"
            found.append(FormatError(text))

        return hook

    leaves = [(name, module) for name, module in transformer.named_modules() if not list(module.children())]
    watched = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        transformer(**kwargs)
    finally:
        for handle in watched:
            handle.remove()
    return found[0] if found else FormatError("calibration: the transformer's output holds NaN or Inf")
