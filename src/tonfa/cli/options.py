"""Options that several commands share, and what their values mean."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tonfa.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

Dtype = Literal["bfloat16", "float16", "float32"]
Activations = Literal["int4", "int8", "fp8", "none"]
Attention = Literal["sdpa", "fp8", "auto"]

DeviceOption = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda[:N]", help="Where to run.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Of everything that is not quantized.")]
ActivationsOption = Annotated[
    Activations | None,
    typer.Option("--activations", help="How inputs of 4-bit layers are quantized.", show_default="the device's"),
]
AttentionOption = Annotated[
    Attention | None,
    typer.Option(
        "--attention",
        help="In 16 bits (sdpa), in FP8 on a Hopper GPU or newer, or what is faster (auto).",
        show_default="the library's",
    ),
]

HIGHEST_GUIDANCE = 1000
"""Scales above it, and infinite ones, are mistakes: 3.5 to 30 are usual."""

LONGEST_TEXT = 512
"""The longest prompt that FLUX's pipelines accept, in T5's tokens."""


def check_seed(seed: int, count: int = 1) -> None:
    """Raise a usage error unless `seed` and the `count` - 1 after it fit 63 bits, as PyTorch's generators want them."""
    if seed + count > 2**63:
        raise typer.BadParameter(f"{seed} is too large: seeds are below 2**63", param_hint="--seed")


def check_offload(offload: bool, place: torch.device) -> None:
    """Raise a usage error where there is no GPU to spare."""
    if offload and place.type != "cuda":
        raise typer.BadParameter(f"there is nothing to offload to from {place}; it needs a GPU", param_hint="--offload")


def parse_device(text: str) -> torch.device:
    """The device that `--device` names. Raises UnsupportedError where this machine lacks it."""
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]+)?", text):
        raise typer.BadParameter(f"{text!r} is none of auto, cpu, cuda, cuda:N", param_hint="--device")
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if text == "cpu":
        return torch.device("cpu")
    index = int(text.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise UnsupportedError(f"--device {text}: PyTorch {torch.__version__} sees no CUDA GPU; use --device cpu")
    if index >= count:
        raise UnsupportedError(f"--device {text}: this machine has {count} GPU(s), counted from 0")
    return torch.device("cuda", index)


def parse_dtype(name: Dtype) -> torch.dtype:
    """The dtype of this name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
