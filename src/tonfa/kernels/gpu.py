"""Whether a device is a GPU that this PyTorch can use. Asking for its capability raises where there is none."""

from __future__ import annotations

import torch


def reason_against_gpu(device: torch.device) -> str | None:
    """None if the device is a GPU that is there, otherwise why not and what would help."""
    if device.type != "cuda":
        return f"it computes on CUDA GPUs, not on {device.type}"
    count = torch.cuda.device_count()
    if count == 0 and torch.version.cuda is None and torch.version.hip is None:
        return "no CUDA device: this build of PyTorch has no CUDA, install one from https://pytorch.org"
    if count == 0:
        return "no CUDA device: PyTorch finds no GPU, check the driver with nvidia-smi"
    if device.index is not None and device.index >= count:
        return f"no CUDA device {device.index}: PyTorch finds {count}, counted from 0"
    return None


def reason_against_nvidia(device: torch.device) -> str | None:
    """The same for a GPU of NVIDIA's, by whose capability the kernels of one architecture are chosen."""
    reason = reason_against_gpu(device)
    if reason is None and torch.version.cuda is None:
        return "this build of PyTorch has no CUDA: install one from https://pytorch.org"
    return reason
