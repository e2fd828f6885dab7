"""Every kernel that a FLUX model runs for pictures of usual sizes, for building them ahead of use.

Which tiles a kernel takes depends on the rows and on the GPU's multiprocessors: 512 to 1536 pixels a side take nearly
all that there are. What other sizes take in addition, and branches of other ranks, is built when it is first met.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from tonfa.kernels.cuda.kernel import ELEMENTS, Kernel
from tonfa.kernels.hopper import add_lowrank, attention_center, expand, product_kernel, quantize, tiles
from tonfa.kernels.hopper.product_kernel import GATE_RESIDUAL, GELU_QUANTIZE, NORM_ROPE, NORM_ROPE_FP8

MULTIPROCESSORS = 132
"""Of an H200, and of an H100 but its PCIe card."""

HIDDEN, MLP = 3072, 12288
RANK = 32
SIDES, PIXELS = range(512, 1537, 64), 16
"""Of pictures, and of a token."""
TEXTS = (256, 512)


def token_counts() -> list[int]:
    """Rows of the text's, the picture's and the joined stream."""
    pictures = {(height // PIXELS) * (width // PIXELS) for height in SIDES for width in SIDES}
    return sorted({*TEXTS, *pictures, *(text + picture for text in TEXTS for picture in pictures)})


def _products(dtype: torch.dtype, multiprocessors: int) -> Iterator[Kernel]:
    for rows in token_counts():
        for epilogue, n, k in (
            (NORM_ROPE, 3 * HIDDEN, HIDDEN),
            (NORM_ROPE_FP8, 3 * HIDDEN, HIDDEN),
            (GATE_RESIDUAL, HIDDEN, HIDDEN),
            (GATE_RESIDUAL, HIDDEN, MLP),
        ):
            tokens = tiles.choose(rows, n, k, multiprocessors, epilogue != GATE_RESIDUAL)
            cluster = tiles.cluster(n, multiprocessors)
            yield product_kernel.kernel(dtype, epilogue, tokens, cluster=cluster)
        cluster = tiles.cluster(MLP, multiprocessors)
        tokens, run = tiles.choose_run(rows, MLP, HIDDEN, multiprocessors, RANK, cluster)
        yield product_kernel.kernel(dtype, GELU_QUANTIZE, tokens, RANK, tiles.cluster(MLP, multiprocessors, run))


def _quantizers(dtype: torch.dtype, multiprocessors: int) -> Iterator[Kernel]:
    for rows in token_counts():
        block = quantize.rows_of_block(rows, HIDDEN, multiprocessors)
        for norm, from_fp8 in ((True, False), (False, False), (False, True)):
            yield quantize.kernel(dtype, norm, HIDDEN, block, from_fp8)


def kernels(multiprocessors: int = MULTIPROCESSORS, dtypes: Iterable[torch.dtype] = tuple(ELEMENTS)) -> list[Kernel]:
    """All specializations for these dtypes, attention in 16 bits and in FP8; modulations are the CUDA backend's."""
    found = [expand.kernel(), add_lowrank.kernel()]
    for dtype in dtypes:
        found += _quantizers(dtype, multiprocessors)
        found += _products(dtype, multiprocessors)
        found.append(attention_center.kernel(dtype, HIDDEN))
    return list(dict.fromkeys(found))
