"""The kernel of the products (device/product.cu): its parameter, its variants, its launch behind the expansion."""

from __future__ import annotations

from ctypes import c_int32, c_int64, c_void_p
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from tonfa.errors import FormatError
from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.cuda.launch import launch
from tonfa.kernels.hopper import tiles
from tonfa.kernels.hopper.activation import HopperActivation
from tonfa.kernels.hopper.device_facts import multiprocessors
from tonfa.kernels.hopper.expanded import expanded
from tonfa.kernels.hopper.packed_product import PackedProduct
from tonfa.ops.activation import QuantizedActivation

PLAIN, GELU, GATE_RESIDUAL, NORM_ROPE, GELU_QUANTIZE, NORM_ROPE_FP8 = range(6)


class Product(Struct):
    """The kernel's parameter."""

    _fields_ = [  # noqa: RUF012
        *(
            (name, c_void_p)
            for name in (
                "x",
                "x_scale",
                "lora",
                "w",
                "w_scale",
                "up",
                "bias",
                "out",
                "out_k",
                "out_v",
                "residual",
                "gate",
                "norm_q",
                "norm_k",
                "rotary",
                "factors",
                "next_inverse",
                "absmax",
                "norms",
                "bound",
                "next_down",
                "next_codes",
                "next_scale",
                "partial",
            )
        ),
        *((name, c_int64) for name in ("batch_stride", "token_stride", "head_stride")),
        *(
            (name, c_int32)
            for name in (
                "m",
                "m_pad",
                "n",
                "k",
                "rank",
                "rank_start",
                "length",
                "heads",
                "gate_stride",
                "run",
                "w_stays",
            )
        ),
    ]


@lru_cache(maxsize=128)
def kernel(dtype: torch.dtype, epilogue: int, tokens: int, down_rank: int | None = None, cluster: int = 1) -> Kernel:
    """The kernel with this epilogue, for tiles of so many rows, in clusters of so many blocks.

    `down_rank`: with GELU_QUANTIZE the rank of the next linear.
    """
    from tonfa.kernels.hopper.wgmma import wrappers

    values = {
        "TOKENS": tokens,
        "STAGES": tiles.stages(tokens, down_rank),
        "THREADS": tiles.threads(tokens),
        "CLUSTER": cluster,
        "EPILOGUE": epilogue,
        "FP16": int(dtype == torch.float16),
    }
    if down_rank is not None:
        values["DOWN_RANK"] = down_rank
    defines = tuple((name, str(value)) for name, value in values.items())
    threads, shared = values["THREADS"], tiles.shared_bytes(tokens, down_rank)
    preamble = wrappers(tokens, down_rank or 0, dtype == torch.float16)
    package = "tonfa.kernels.hopper"
    return Kernel("product", defines, (Product,), threads, shared, package, "a", preamble, early=True, cluster=cluster)


def start(
    x: QuantizedActivation,
    w: PackedProduct,
    epilogue: int,
    tile: tuple[int, int] | None = None,
    down_rank: int | None = None,
    bias: Tensor | None = None,
    **values: Any,
) -> None:
    """Expand the weights and start the product; `values` are what the epilogue needs of `Product`.

    `tile`: its tokens, and how many of the same tokens a block takes one after another. `bias`: (N,)
    float32, in place of the weights' own.
    """
    if not isinstance(x, HopperActivation):
        raise FormatError("product: the input must come from this backend's quantize")
    if (x.channels, x.rank) != (w.in_features, w.rank):
        found, expected = f"{x.channels} channels of rank {x.rank}", f"{w.in_features} of rank {w.rank}"
        raise FormatError(f"product: the input has {found}, the weights have {expected}")
    if x.rows == 0:
        return
    device, n = x.codes.device, w.columns
    count = multiprocessors(device)
    much = epilogue in (NORM_ROPE, NORM_ROPE_FP8, GELU)
    tokens, run = tile or (tiles.choose(x.rows, n, x.channels, count, much), 1)
    parameters = Product(
        x=x.codes.data_ptr(),
        x_scale=x.scales.data_ptr(),
        lora=x.lowrank.data_ptr(),
        w=expanded(w, device).data_ptr(),
        w_scale=w.row_scales.data_ptr(),
        up=w.up.data_ptr(),
        bias=(w.bias if bias is None else bias).data_ptr(),
        m=x.rows,
        m_pad=x.codes.shape[1],
        n=n,
        k=x.channels,
        rank=x.rank,
        rank_start=x.rank_start,
        run=run,
        w_stays=int(w.wide is not None),
        **values,
    )
    units = -(-x.rows // tokens) * -(-n // (tiles.CHANNELS * run))
    specialized = kernel(x.dtype, epilogue, tokens, down_rank, tiles.cluster(n, count, run))
    launch(specialized, device, (min(count, units),), parameters)
