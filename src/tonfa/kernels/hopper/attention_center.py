"""attention_center: what FP8 attention takes from v, and its scales, before any head is computed; in one kernel.

v's center comes from the mean of 32 rows of the input: on random weights of FLUX's size (1024 x 1024) a step's error is
the same with the mean of all tokens. Scales come from bounds: |v| is at most the norm of a row times that of a row of
the weights (Cauchy-Schwarz), ten to a hundred times the largest |v|, which e4m3 with its fifteen binades does not feel.

3072 channels: 96 blocks read 5 MB of weights, and the samples from L2.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_int32, c_void_p
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.hopper.activation import HopperActivation
from tonfa.kernels.hopper.layout import ROW_BYTES
from tonfa.kernels.hopper.packed_product import PackedProduct
from tonfa.ops.attention_fp8 import LARGEST_BOUND, P_SCALE, SCALARS, SMALLEST_BOUND

_THREADS = 384
_CHANNELS = 32  # of a block


class Stream(Struct):
    """Of one or two."""

    _fields_ = [  # noqa: RUF012
        *((name, c_void_p) for name in ("norms", "bound", "norm_q", "norm_k", "bias", "shifted")),
        ("rows", c_int32),
    ]


class AttentionCenter(Struct):
    """The kernel's parameter."""

    _fields_ = [  # noqa: RUF012
        ("streams", Stream * 2),
        *(
            (name, c_void_p)
            for name in (
                "x",
                "x_scale",
                "lora",
                "qweight",
                "wscales",
                "w_scale",
                "up",
                "center",
                "factors",
                "scalars",
                "descale",
            )
        ),
        *((name, c_int32) for name in ("stream_count", "sampled", "m_pad", "k", "values", "rank", "rank_start")),
    ]


@dataclass(frozen=True)
class Source:
    """What makes q, k and v of some tokens."""

    x: HopperActivation
    norms: Tensor  # x's
    w: PackedProduct
    norm_q: Tensor  # (D,) of x's dtype
    norm_k: Tensor  # (D,)


@dataclass(frozen=True)
class Prepared:
    """What heads are rounded by, and the same for cuDNN."""

    biases: tuple[Tensor, ...]  # (3 * H * D,) float32 of each source: its bias, v's less the center
    center: Tensor  # (H * D,) of x's dtype
    factors: Tensor  # (3,) float32: powers of two that q, k and v are multiplied with
    scalars: Tensor  # (8, 4) float32, as in QuantizedHeads
    descale: Tensor  # (1,) float32


@lru_cache(maxsize=4)
def kernel(dtype: torch.dtype, channels: int) -> Kernel:
    """The kernel for inputs of so many channels."""
    values = {"FP16": str(int(dtype == torch.float16)), "P_SCALE": f"{P_SCALE}f"}
    values |= {"SMALLEST_BOUND": f"{SMALLEST_BOUND.hex()}f", "LARGEST_BOUND": f"{LARGEST_BOUND.hex()}f"}
    shared = -(-channels // ROW_BYTES) * ROW_BYTES * 2  # bf16
    package = "tonfa.kernels.hopper"
    return Kernel(
        "attention_center", tuple(values.items()), (AttentionCenter,), _THREADS, shared, package, "a", early=True
    )


def prepare(
    sources: Sequence[Source],  # one or two, of as many channels
    sampled: int,  # the source whose v the center is taken of
) -> Prepared:
    """Start the kernel."""
    main, device = sources[sampled], sources[sampled].x.codes.device
    values = main.w.out_features // 3
    found = Prepared(
        tuple(torch.empty(3 * values, device=device) for _ in sources),
        torch.empty(values, dtype=main.x.dtype, device=device),
        torch.empty(3, device=device),
        torch.empty((len(SCALARS), 4), device=device),
        torch.empty(1, device=device),
    )
    streams = [
        Stream(
            norms=source.norms.data_ptr(),
            bound=source.w.value_bound.data_ptr(),
            norm_q=source.norm_q.data_ptr(),
            norm_k=source.norm_k.data_ptr(),
            bias=source.w.bias.data_ptr(),
            shifted=bias.data_ptr(),
            rows=source.x.rows,
        )
        for source, bias in zip(sources, found.biases, strict=True)
    ]
    parameters = AttentionCenter(
        streams=(Stream * 2)(*streams),
        x=main.x.codes.data_ptr(),
        x_scale=main.x.scales.data_ptr(),
        lora=main.x.lowrank.data_ptr(),
        qweight=main.w.qweight.data_ptr(),
        wscales=main.w.wscales.data_ptr(),
        w_scale=main.w.row_scales.data_ptr(),
        up=main.w.up.data_ptr(),
        center=found.center.data_ptr(),
        factors=found.factors.data_ptr(),
        scalars=found.scalars.data_ptr(),
        descale=found.descale.data_ptr(),
        stream_count=len(sources),
        sampled=sampled,
        m_pad=main.x.codes.shape[1],
        k=main.x.channels,
        values=values,
        rank=main.x.rank,
        rank_start=main.x.rank_start,
    )
    launch(kernel(main.x.dtype, main.x.channels), device, (values // _CHANNELS + 1,), parameters)
    return found
