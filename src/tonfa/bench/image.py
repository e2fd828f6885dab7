"""Whole pictures: a pipeline with its 16-bit transformer and with the same one in 4 bits, taking turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tonfa.bench.models import transformer_folder
from tonfa.bench.protocol import Say, interleaved, record
from tonfa.checkpoint.reading import read_json
from tonfa.dispatch import default_activations
from tonfa.errors import CheckpointError, TonfaError, UnsupportedError
from tonfa.models.flux.guidance import choose_guidance
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.quantizer.recipe import Recipe

PROMPT = "a small red sphere and a yellow cone on a striped floor"
BASELINE = "bf16"


@dataclass(frozen=True)
class ImageRequest:
    """Everything that `tonfa bench image` was asked for."""

    model: str
    """Folder of a Diffusers pipeline with a 16-bit transformer."""
    transformer: str | None
    """4-bit checkpoint; None quantizes the pipeline's own, without calibration data."""
    height: int
    width: int
    steps: int
    text_tokens: int
    rank: int
    activations: str | None
    runs: int
    seed: int
    device: torch.device


def bench_image(request: ImageRequest, say: Say) -> list[dict[str, Any]]:
    """Seconds a picture, text encoders and decoder included: one record in 4 bits and one in 16."""
    device = request.device
    policy = request.activations or default_activations(device)
    say(f"loading {request.model}")
    dense = _load(request.model).to(device)
    dense.set_progress_bar_config(disable=True)
    if request.transformer is None:
        say("quantizing its transformer")
        quantized = SVDQFluxTransformer2DModel.from_dense(
            dense.transformer, Recipe(rank=request.rank), activations=policy
        )
    else:
        quantized = SVDQFluxTransformer2DModel.from_pretrained(
            request.transformer, device=device, dtype=torch.bfloat16, activations=policy
        )
    pipe = type(dense)(**{**dense.components, "transformer": quantized})
    pipe.set_progress_bar_config(disable=True)
    draws = {"tonfa": _draw(pipe, request), BASELINE: _draw(dense, request)}
    for name, draw in draws.items():
        say(f"first picture of {name}")
        if not bool(torch.isfinite(draw()).all()):
            raise TonfaError(f"{name}: the picture is not finite; no speed is recorded")
    say(f"{request.runs} pictures of each in turn")
    timings = interleaved({name: [draw] for name, draw in draws.items()}, request.runs, device, warmup=0)
    seconds = {name: timing.scaled(1e-3) for name, timing in timings.items()}
    case = {
        "height": request.height,
        "width": request.width,
        "batch": 1,
        "steps": request.steps,
        "text_tokens": request.text_tokens,
        "control": _takes_control(dense.transformer.config),
        "rank": int(quantized.config.quantization_config["rank"]),
        "seed": request.seed,
    }
    settings = {
        "tonfa": {"weights": "int4", "activations": policy},
        BASELINE: {"weights": "bf16", "activations": "bf16"},
    }
    models = {"tonfa": quantized, BASELINE: dense.transformer}
    return [
        record(
            bench="image",
            case=case,
            variant=f"tonfa int4 weights, {policy} activations" if name == "tonfa" else name,
            settings=settings[name],
            timing=timing,
            device=device,
            baselines={BASELINE: seconds[BASELINE]},
            memory_gib={"weights": sum(t.numel() * t.itemsize for t in models[name].state_dict().values()) / 2**30},
            unit="s",
        )
        for name, timing in seconds.items()
    ]


def _takes_control(config: Any) -> bool:
    return config["in_channels"] != (config["out_channels"] or config["in_channels"])


def _load(model: str) -> Any:
    from diffusers import FluxControlPipeline, FluxPipeline

    if not (Path(model).expanduser() / "model_index.json").is_file():
        raise CheckpointError(f"--model {model}: no folder of a Diffusers pipeline")
    config = read_json(transformer_folder(model) / "config.json")
    if config.get("quantization_config") is not None:
        raise UnsupportedError(f"--model {model}: its transformer is 4-bit; name a pipeline in 16 bits to compare with")
    control = int(config.get("in_channels", 64)) != int(config.get("out_channels") or config.get("in_channels", 64))
    pipeline_class = FluxControlPipeline if control else FluxPipeline
    return pipeline_class.from_pretrained(Path(model).expanduser(), dtype=torch.bfloat16)


def _draw(pipe: Any, request: ImageRequest) -> Callable[[], Tensor]:
    """One picture (1, 3, H, W), of the same noise every time; a control model sees a ramp from far to near."""
    extra: dict[str, Any] = {}
    if _takes_control(pipe.transformer.config):
        ramp = torch.linspace(0, 1, request.height)[:, None].expand(request.height, request.width)
        extra["control_image"] = ramp.expand(1, 3, -1, -1).contiguous()

    guidance = choose_guidance(None, takes_control=bool(extra))

    def draw() -> Tensor:
        picture: Tensor = pipe(
            prompt=PROMPT,
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(request.seed),
            max_sequence_length=request.text_tokens,
            output_type="pt",
            **extra,
        ).images
        return picture

    return draw
