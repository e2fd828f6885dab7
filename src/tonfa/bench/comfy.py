"""comfy-kitchen's SVDQuant linear: the one library whose INT4 kernels run on every GPU from sm_80 on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.errors import UnsupportedError
from tonfa.weights import SVDQWeights

LAYOUT = "TensorCoreSVDQuantW4A4Layout"


def comfy_linear(w: SVDQWeights) -> Callable[[Tensor], Tensor]:
    """x (M, K) -> (M, N) with the same weights: its canonical layout is ours.

    Quantizes x to 4 bits inside, on the path that its own users run. Raises UnsupportedError where it is not installed,
    and on a GPU where its compiled kernels are not: it would compute in plain PyTorch then, without a word.
    """
    try:
        from comfy_kitchen.tensor import QuantizedTensor, TensorCoreSVDQuantW4A4Layout
    except ImportError as error:
        raise UnsupportedError(f"comfy-kitchen cannot be used (pip install comfy-kitchen): {error}") from error
    if w.qweight.device.type == "cuda":
        from comfy_kitchen.backends import cuda

        if not getattr(cuda, "_EXT_AVAILABLE", True):
            reason = getattr(cuda, "_EXT_ERROR", None) or "it gives no reason"
            raise UnsupportedError(f"comfy-kitchen's CUDA kernels are not loaded: {reason}")
    params = TensorCoreSVDQuantW4A4Layout.Params(
        scale=w.wscales,
        orig_dtype=w.wscales.dtype,
        orig_shape=(w.out_features, w.in_features),
        proj_down=w.proj_down,
        proj_up=w.proj_up,
        smooth_factor=w.smooth_factor,
        act_unsigned=w.unsigned,
    )
    weight = QuantizedTensor(w.qweight.view(torch.int8), LAYOUT, params)
    return partial(functional.linear, weight=weight, bias=w.bias)
