"""A pipeline of Diffusers with our transformer: checked from its configuration files first, then loaded, then run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tonfa.checkpoint.reading import exists, local_path
from tonfa.cli.sources import read_json
from tonfa.errors import CheckpointError, FormatError, UnsupportedError
from tonfa.models.flux.plan import DENSE_CLASS, check_counts

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

FLUX_CLASSES = (DENSE_CLASS, "SVDQFluxTransformer2DModel")


@dataclass(frozen=True)
class Placement:
    """Where a pipeline runs and in which numbers."""

    device: torch.device
    dtype: torch.dtype
    activations: str | None
    offload: bool
    attention: str | None = None
    """None takes the default."""


@dataclass(frozen=True)
class Settings:
    """What is drawn."""

    prompt: str
    height: int
    width: int
    steps: int
    guidance: float
    max_sequence_length: int
    control: Image | None = None


class StepClock:
    """Seconds of every denoising step; a `callback_on_step_end` that also stops where numbers have gone bad."""

    def __init__(self, on_step: Callable[[], None]) -> None:
        self.on_step, self.seconds = on_step, list[float]()
        self.start()

    def start(self) -> None:
        """A step begins now."""
        self._last = time.perf_counter()

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Note a finished step. Reading the latents waits for the device, so the time is this step's own."""
        if not tensors["latents"].isfinite().all():
            raise FormatError(f"step {step + 1}: the latents hold NaN or Inf; try --dtype bfloat16 or float32")
        self.seconds.append(time.perf_counter() - self._last)
        self.start()
        self.on_step()
        return tensors

    @property
    def median(self) -> float:
        """Seconds of the middle step. The first of a batch also encodes the prompt and chooses the kernels."""
        return sorted(self.seconds)[len(self.seconds) // 2] if self.seconds else 0.0


@dataclass(frozen=True)
class Facts:
    """What the configuration files say of a pipeline and its transformer."""

    takes_control: bool
    is_quantized: bool
    config: Mapping[str, Any]
    """The transformer's."""


def examine(model: str, transformer: str | None) -> Facts:
    """Read the configuration of `model` with `transformer` in place of its own; no weights are read.

    Raises CheckpointError where this is no FLUX pipeline, UnsupportedError for variants with other inputs.
    """
    from tonfa.models.flux.checkpoints import is_single_file, open_checkpoint

    index = read_json(model, "model_index.json", "MODEL")
    if index is None:
        raise CheckpointError(f"MODEL: {model} has no model_index.json, so it is no pipeline of Diffusers")
    name = str((index.get("transformer") or [None, None])[1])
    if name not in FLUX_CLASSES:
        raise CheckpointError(f"no FLUX model: the transformer of {model} is {name}, expected {DENSE_CLASS}")
    config: Mapping[str, Any] | None
    if transformer is None:
        config = read_json(model, "transformer/config.json", "MODEL")
    elif is_single_file(transformer):
        config = open_checkpoint(transformer).config
    else:
        config = read_json(transformer, "config.json", "--transformer")
    if config is None:
        own = None if transformer is None else local_path(transformer) / "transformer"
        hint = f"; give {own}" if own is not None and exists(own) else ""
        raise CheckpointError(f"{transformer or model}: it has no config.json of a transformer{hint}")
    # Nunchaku's folders do not say of themselves that they are quantized; nothing else is taken as --transformer.
    quantized = transformer is not None or config.get("quantization_config") is not None
    return Facts(takes_control(config), quantized, config)


def takes_control(config: Mapping[str, Any]) -> bool:
    """Whether a transformer reads a control image.

    Raises UnsupportedError for other inputs, CheckpointError for sizes that are none.
    """
    check_counts(config, "the transformer's config.json")
    read: int = config.get("in_channels", 64)
    written: int = config.get("out_channels") or read
    if read == written:
        return False
    if read == 2 * written:
        return True
    raise UnsupportedError(
        f"the transformer reads {read} channels and writes {written}: only text-to-image (as many) and control "
        "(twice as many) models are drawn from the command line; use the matching pipeline of Diffusers"
    )


def quieten_libraries() -> None:
    """Silence what Diffusers and Transformers print while they load: bars, and hints for packages they do not need."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()


def prompts_may_be_cut() -> None:
    """Let Diffusers speak again: it says which part of a long prompt the text encoders do not see."""
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.set_verbosity_warning()


def load_transformer(checkpoint: str, placement: Placement, subfolder: str | None = None) -> Any:
    """The 4-bit transformer, still on the CPU where the pipeline will offload."""
    from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
    from tonfa.ops.table import DEFAULT_ATTENTION

    return SVDQFluxTransformer2DModel.from_pretrained(
        checkpoint,
        subfolder=subfolder,
        torch_dtype=placement.dtype,
        activations=placement.activations,
        attention=placement.attention or DEFAULT_ATTENTION,
    )


def _components(model: str, transformer: str | None, placement: Placement) -> dict[str, Any]:
    """What is not left to Diffusers: a given transformer, and one that Diffusers loads for some GPUs alone."""
    from tonfa.models.flux.lite import is_lite

    if transformer is not None:
        return {"transformer": load_transformer(transformer, placement)}
    if is_lite(read_json(model, "transformer/config.json", "MODEL") or {}):
        return {"transformer": load_transformer(model, placement, "transformer")}
    return {}


def load(model: str, transformer: str | None, control: bool, placement: Placement) -> Any:
    """The pipeline on its device. Without `transformer`, the model's own is taken, in whatever precision it is."""
    quieten_libraries()
    components = _components(model, transformer, placement)
    pipe = assemble(model, components, control, placement)
    if not components and placement.activations is not None:
        pipe.transformer.set_activations(placement.activations)
    if not components and placement.attention is not None:
        pipe.transformer.set_attention(placement.attention)
    return to_device(pipe, placement)


def to_device(pipe: Any, placement: Placement) -> Any:
    """The pipeline on its device, or ready to go there a part at a time. From here on Diffusers may speak again."""
    if placement.offload:
        pipe.enable_model_cpu_offload(device=placement.device)
    else:
        pipe = pipe.to(placement.device)  # warns of float16 on CPUs, which draws well
    prompts_may_be_cut()
    return pipe


def assemble(model: str, components: Mapping[str, Any], control: bool, placement: Placement) -> Any:
    """The pipeline on the CPU, for `to_device`, with `components` in place of the model's own."""
    quieten_libraries()
    from diffusers import FluxControlPipeline, FluxPipeline

    import tonfa  # noqa: F401  (Diffusers finds a saved 4-bit transformer's class in an imported `tonfa` alone)

    pipeline_class = FluxControlPipeline if control else FluxPipeline
    try:
        pipe = pipeline_class.from_pretrained(model, dtype=placement.dtype, **components)
    except ValueError as error:
        raise CheckpointError(f"model {model}: it does not load: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def describe_transformer(transformer: Any, placement: Placement) -> str:
    """Precision, activation policy and backend, for people."""
    if type(transformer).__name__ != "SVDQFluxTransformer2DModel":
        return f"{str(placement.dtype).removeprefix('torch.')}, not quantized"
    from tonfa.dispatch import bind, default_activations, resolve_attention
    from tonfa.ops.table import DEFAULT_ATTENTION

    attention = resolve_attention(placement.device, placement.attention or DEFAULT_ATTENTION)
    activations = placement.activations or default_activations(placement.device)
    backend = bind(placement.device, activations).backend
    rank = transformer.config.quantization_config["rank"]
    weights = f"4-bit weights and a rank-{rank} branch"
    return f"{weights}, {activations} activations, {attention} attention, {backend} backend"


def draw(pipe: Any, settings: Settings, seeds: list[int], batch_size: int, clock: StepClock) -> Iterator[Image]:
    """One picture for each seed, in order. Each has its own CPU generator: pictures do not depend on their batch."""
    import torch

    for start in range(0, len(seeds), batch_size):
        batch = seeds[start : start + batch_size]
        clock.start()
        extra = {} if settings.control is None else {"control_image": settings.control}
        pictures = pipe(
            prompt=[settings.prompt] * len(batch),
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in batch],
            max_sequence_length=settings.max_sequence_length,
            callback_on_step_end=clock,
            output_type="pt",
            **extra,
        ).images
        yield from _to_pil(pictures)


def _to_pil(
    pictures: torch.Tensor,  # (B, 3, H, W) from 0 to 1
) -> Iterator[Image]:
    import torch
    from PIL import Image

    if not torch.isfinite(pictures).all():
        raise FormatError("the decoded picture holds NaN or Inf; try --dtype bfloat16 or float32")
    for picture in (pictures.float() * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy():
        yield Image.fromarray(picture)
