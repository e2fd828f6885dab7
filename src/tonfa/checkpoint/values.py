"""Values that a checkpoint's tensors may not hold, because results would be NaN or Inf."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tonfa.checkpoint.strict import dtype_name
from tonfa.errors import CheckpointError


def flaws(name: str, tensor: Tensor) -> Iterator[str]:
    """What is wrong with a native tensor's values. Two codes fill a byte, so no code is out of range; floats can be."""
    if not tensor.is_floating_point():
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        yield f"{bad} of {tensor.numel()} values are not finite"
    if name.endswith(".smooth_factor"):
        low = int((tensor <= 0).sum())
        if low:
            yield f"{low} of {tensor.numel()} smoothing factors are not positive"
        # Kernels may multiply by the reciprocal, which float32 cannot hold below 2.9e-39.
        tiny = int(((tensor > 0) & tensor.float().reciprocal().isinf()).sum())
        if tiny:
            yield f"{tiny} of {tensor.numel()} smoothing factors are too small to divide by"


def check_values(name: str, tensor: Tensor, where: str) -> None:
    """Raise CheckpointError, naming the tensor, if it has a flaw."""
    for flaw in flaws(name, tensor):
        kind = dtype_name(tensor.dtype)
        raise CheckpointError(f"{where}: {name}: {flaw} as {kind}; `tonfa verify` tells if those of the file are")
