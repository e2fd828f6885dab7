"""What the quantizers know of the linears that read an input, packed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.cuda.contract import aligned
from tonfa.kernels.hopper.layout import pack_fragments
from tonfa.ops.activation import InputWeights
from tonfa.ops.quantize import check_input

RANK_STEP = 16
LARGEST_RANK = 256
LARGEST_CHANNELS = 8192
"""Of a row that one block takes whole."""


@dataclass(frozen=True, eq=False)
class PackedInput:
    """`InputWeights` as the kernels read them."""

    inverse: Tensor  # (K,) float32, 1 / smooth_factor
    down: Tensor  # (R, K) 16-bit
    fragments: Tensor | None  # the same for mma, (K/128, R/16, 8, 32, 8); None beyond LARGEST_CHANNELS
    dtype: torch.dtype

    @property
    def channels(self) -> int:
        """K."""
        return self.inverse.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.down.shape[0]


def takes(dtype: torch.dtype, rank: int) -> bool:
    """Whether this backend's kernels compute in this dtype with a branch of this rank."""
    return dtype in (torch.bfloat16, torch.float16) and rank % RANK_STEP == 0 and rank <= LARGEST_RANK


def pack_input(w: InputWeights) -> PackedInput:
    """Transpose proj_down, once plainly and once in fragments; invert smooth_factor."""
    down = w.proj_down.detach().t().contiguous()
    fragments = pack_fragments(down) if down.shape[1] <= LARGEST_CHANNELS else None
    return PackedInput(w.smooth_factor.detach().float().reciprocal(), down, fragments, down.dtype)


def rows_of(
    x: Tensor,  # (..., K)
    w: PackedInput,
    dtype: torch.dtype,  # x's, or the one that its codes stand for
    what: str,
) -> Tensor:
    """(B, L, K) whose rows the kernels can read where they are."""
    check_input(x, w.inverse)
    if dtype != w.dtype:
        raise FormatError(f"{what}: the input is {dtype}, the weights are {w.dtype}; convert one of them")
    if x.ndim != 3:
        x = x.reshape(1, -1, x.shape[-1])
    whole = 16 // x.element_size()
    readable = x.stride(2) == 1 and x.stride(0) % whole == 0 and x.stride(1) % whole == 0 and x.data_ptr() % 16 == 0
    return x if readable else aligned(x)
