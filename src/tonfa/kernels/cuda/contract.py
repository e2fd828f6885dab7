"""What the kernels need of tensors, checked before anything is started, and how tensors are brought into that form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.errors import FormatError, UnsupportedError
from tonfa.kernels.cuda.kernel import ELEMENTS

_ALIGNMENT = 16
_LARGEST_OPERAND = 2**32


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def check_weight_dtype(dtype: torch.dtype, what: str) -> None:
    """Raise UnsupportedError unless the kernels compute with this dtype."""
    if dtype not in ELEMENTS:
        raise UnsupportedError(
            f"{what}: backend 'cuda' computes in bfloat16 and float16, the weights are {dtype}; convert the layer with "
            f".to(torch.bfloat16) or choose backend='reference'"
        )


def expect(what: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise FormatError, naming `what`, unless shape, dtype and device are these."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise FormatError(
            f"{what}: expected {dtype} of shape {shape} on {device}, "
            f"got {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}; convert it with .to()"
        )


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy that is contiguous and begins at a multiple of 16 bytes."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.data_ptr() % _ALIGNMENT == 0 else tensor.clone()


def padded(tensor: Tensor, *shape: int) -> Tensor:
    """The tensor itself, or a copy with zeros behind it up to `shape`; aligned."""
    missing = [after - before for before, after in zip(tensor.shape, shape, strict=True)]
    if any(missing):
        tensor = functional.pad(tensor, [n for m in reversed(missing) for n in (0, m)])
    return aligned(tensor)


def check_operand(what: str, rows: int, channels: int) -> None:
    """Raise FormatError if byte offsets into packed codes (rows, channels / 2) do not fit 32 bits."""
    if rows * channels // 2 >= _LARGEST_OPERAND:
        raise FormatError(f"{what}: {rows} rows of {channels} channels take more than 4 GiB of codes; split the rows")
