"""The ways to compute attention that a user may choose: where each can run, and its kernel."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from tonfa.ops.table import AttentionChoice


def _reason_against_fp8(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"it computes on a CUDA GPU, not on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"cuDNN's FP8 attention needs sm_90 or newer, this GPU is sm_{capability[0]}{capability[1]}"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed: pip install 'tonfa[cudnn]'"
    return None


def _fp8() -> Callable[..., Tensor]:
    from tonfa.kernels.attention import fp8

    return fp8.attention


SDPA = AttentionChoice("sdpa", lambda device: None, None)
FP8 = AttentionChoice("fp8", _reason_against_fp8, _fp8)
CHOICES = (SDPA, FP8)
