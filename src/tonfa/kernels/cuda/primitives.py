"""What the compositions in ops/fused.py are made of on this backend, for shapes that a fused kernel does not take."""

from __future__ import annotations

from tonfa.kernels.cuda.product import product as _product
from tonfa.kernels.cuda.quantize import quantize as _quantize


class Primitives:
    """`ops.fused.Primitives` of this backend."""

    quantize = staticmethod(_quantize)
    product = staticmethod(_product)
