"""Run with TRITON_INTERPRET=1, which must be set before Triton is imported: the quantizers against the reference.

The interpreter rounds to e4m3 wrongly, so the kernel's numbers are compared before they are rounded.
"""

from __future__ import annotations

import torch

from support import attention_inputs, attention_norms
from tonfa.kernels.attention.fp8_dequantize import dequantize
from tonfa.kernels.attention.fp8_quantize import quantize
from tonfa.ops import attention_fp8
from tonfa.ops.attention_fp8 import SCALARS

CASES = [
    ("common", 1, 2, 205, 128, torch.bfloat16),
    ("center", 2, 2, 35, 128, torch.bfloat16),
    ("outliers", 2, 3, 77, 64, torch.float16),
    ("zeros", 1, 3, 65, 80, torch.bfloat16),
    ("gaussian", 1, 1, 1, 16, torch.bfloat16),
]


def main() -> None:
    for kind, batch, heads, tokens, size, dtype in CASES:
        q, k, v = attention_inputs(kind, batch, heads, tokens, size, dtype)
        norms = attention_norms(kind, size)
        if kind == "common":  # as in a single block, whose tokens share one norm
            norms = norms[0][:1], norms[1][1:]
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
        center = attention_fp8.center(v)
        rest = attention_fp8.centered(v, center)
        scales = attention_fp8.exponents(rest, *norms)
        found = quantize(q, k, v, *norms, torch.float32)
        assert torch.equal(found.center, center)
        for x, y, exponent in ((found.q, q, scales.q), (found.k, k, scales.k), (found.v, rest, scales.v)):
            assert x.transpose(1, 2).is_contiguous()
            assert torch.equal(x, torch.ldexp(y.float(), exponent)), kind
        one = torch.ones(1)
        assert torch.equal(found.descale, torch.ldexp(one, -scales.v))
        p = attention_fp8.P_SCALE
        factor = torch.ldexp(one, -(scales.q + scales.k))
        expected = [float(factor), 1.0, 1.0, 1 / p, p, 1.0, 0.0, 0.0]
        assert dict(zip(SCALARS, found.scalars[:, 0].tolist(), strict=True)) == dict(
            zip(SCALARS, expected, strict=True)
        )
        result = torch.randn(batch, tokens, heads, size).to(torch.float8_e4m3fn)
        assert torch.equal(
            dequantize(result.float(), found.descale, center.float()).flatten(2),
            attention_fp8.dequantize(result, scales.v, center, torch.float32),
        )


if __name__ == "__main__":
    main()
