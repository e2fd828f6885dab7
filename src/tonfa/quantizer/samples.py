"""Stored calls of a network: the inputs of chosen calls, a safetensors file each, by number.

A file is written whole or not at all, so that collecting goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tonfa.checkpoint.shards import write_tensors
from tonfa.checkpoint.tensors import TensorFiles
from tonfa.errors import CheckpointError, FormatError


class Samples:
    """The calls 0 to `count` - 1 in a folder, which is made when the first is written."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"

    def write(self, index: int, inputs: Mapping[str, Tensor]) -> None:
        """Store a call's inputs. Raises FormatError, naming the input, for NaN or Inf."""
        for name, tensor in inputs.items():
            if not torch.isfinite(tensor).all():
                raise FormatError(f"calibration sample {index}: {name} holds NaN or Inf; try dtype bfloat16 or float32")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._path(index), inputs)

    def read(self, index: int) -> dict[str, Tensor]:
        """A call's inputs. Raises CheckpointError for a file that is missing or damaged."""
        return dict(TensorFiles([self._path(index)]))

    def has(self, index: int) -> bool:
        """Whether this call has been stored whole."""
        try:
            return bool(self.read(index))
        except CheckpointError:
            return False
