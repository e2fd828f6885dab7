"""The ways to compute attention that a user may choose: where each can run, and its kernel."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from tonfa.kernels.gpu import reason_against_nvidia
from tonfa.ops.table import AttentionChoice, AttentionKernels


def _reason_against_fp8(device: torch.device) -> str | None:
    reason = reason_against_nvidia(device)
    if reason is not None:
        return reason
    capability = torch.cuda.get_device_capability(device)
    if capability < (9, 0):
        return f"cuDNN's FP8 attention needs sm_90 or newer, this GPU is sm_{capability[0]}{capability[1]}"
    if find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed: pip install 'tonfa[cudnn]'"
    return None


def _fp8() -> AttentionKernels:
    from tonfa.kernels.attention import fp8

    return AttentionKernels(fp8.attention, fp8.takes, fp8.attend)


SDPA = AttentionChoice("sdpa", lambda device: None, None)
FP8 = AttentionChoice("fp8", _reason_against_fp8, _fp8)
CHOICES = (SDPA, FP8)


def automatic(device: torch.device) -> str:
    """What "auto" stands for: FP8 on the GPUs where it was measured to pay, if all that it needs is there."""
    runs = FP8.reason_against(device) is None
    return FP8.name if runs and torch.cuda.get_device_capability(device) == (9, 0) else SDPA.name
