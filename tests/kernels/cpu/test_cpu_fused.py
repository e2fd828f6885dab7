"""The CPU's fused ops against the composition of references that they replace.

Errors are taken against the composition in float64 from the same quantized input, and may be at most twice those of the
composition of this backend's own `quantize` and `product`, which rounds more often.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from support import outlier_input, random_weights, relative_error
from tonfa.dispatch import bind
from tonfa.errors import FormatError
from tonfa.formats import INT8
from tonfa.kernels.cpu import product as product_module
from tonfa.kernels.cpu.norm_modulate_quantize import norm_modulate_quantize
from tonfa.kernels.cpu.product import pack_product, product
from tonfa.kernels.cpu.product_gate_residual import product_gate_residual
from tonfa.kernels.cpu.product_gelu_quantize import product_gelu_quantize
from tonfa.kernels.cpu.product_norm_rope import product_norm_rope
from tonfa.kernels.cpu.quantize import pack_input, quantize
from tonfa.ops import fused
from tonfa.ops import product as op
from tonfa.ops.activation import InputWeights, QuantizedActivation
from tonfa.weights import FLOAT_DTYPES, SVDQWeights

BATCH = 2


class Own:
    """This backend's quantize and product, as the compositions take them."""

    quantize = staticmethod(quantize)
    product = staticmethod(product)


def packed_input(w: SVDQWeights) -> object:
    return pack_input(InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "int8"))


def exact_product(x: QuantizedActivation, w: SVDQWeights) -> Tensor:
    """float64 of the op's own input."""
    return op.reference(x, w.unshifted(), "int8", torch.float64)


def case(
    length: int, n: int, k: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[QuantizedActivation, SVDQWeights]:
    w = random_weights(n, k, generator=generator, dtype=dtype)
    x = outlier_input(BATCH * length, k, generator, dtype)
    return quantize(x, packed_input(w)), w


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 75])
def test_norm_modulate_quantize(length: int, dtype: torch.dtype, threads: int, generator: torch.Generator) -> None:
    w = packed_input(random_weights(64, 320, generator=generator, dtype=dtype))
    x = outlier_input(BATCH * length, 320, generator, dtype).view(BATCH, length, 320) + 3
    modulation = torch.randn(BATCH, 960, generator=generator).to(dtype)
    scale, shift = modulation[:, 320:640], modulation[:, 640:]
    found = norm_modulate_quantize(x, scale, shift, w)
    expected = fused.norm_modulate_quantize(Own, x, scale, shift, w)
    assert found.codes.shape == expected.codes.shape and found.codes.dtype == expected.codes.dtype
    assert found.scales is not None and expected.scales is not None
    # Sums in another order change the last bit of a float32, which one rounding in thousands then shows.
    assert (found.codes.int() - expected.codes.int()).abs().max() <= 1
    assert (found.codes != expected.codes).float().mean() < 2e-3
    torch.testing.assert_close(found.scales, expected.scales, rtol=2**-8 if dtype == torch.bfloat16 else 1e-3, atol=0)
    assert found.lowrank is not None and expected.lowrank is not None
    assert relative_error(found.lowrank, expected.lowrank) < (1e-3 if dtype != torch.float32 else 1e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_product_gelu_quantize(dtype: torch.dtype, threads: int, generator: torch.Generator) -> None:
    x, w = case(37, 256, 128, dtype, generator)
    following = random_weights(64, 256, generator=generator, dtype=dtype, unsigned=True)
    inputs = packed_input(following)
    found = product_gelu_quantize(x, pack_product(w, 127), inputs)
    composed = fused.product_gelu_quantize(Own, x, pack_product(w, 127), inputs)
    smooth_factor = following.smooth_factor.double()
    exact = functional.gelu(exact_product(x, w), approximate="tanh")

    def error(q: QuantizedActivation) -> float:
        assert q.scales is not None
        return relative_error(INT8.dequantize(q.codes, q.scales, torch.float64) * smooth_factor, exact)

    assert error(found) <= 1.1 * error(composed)
    assert found.lowrank is not None and composed.lowrank is not None
    exact_lowrank = exact @ following.proj_down.double()
    assert relative_error(found.lowrank, exact_lowrank) <= 2 * relative_error(composed.lowrank, exact_lowrank)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_product_gate_residual(dtype: torch.dtype, threads: int, generator: torch.Generator) -> None:
    x, w = case(37, 200, 128, dtype, generator)
    residual = torch.randn(BATCH, 37, 200, generator=generator).to(dtype)
    gate = torch.randn(BATCH, 600, generator=generator).to(dtype)[:, 200:400]
    packed = pack_product(w, 127)
    found = product_gate_residual(x, packed, residual, gate)
    composed = fused.product_gate_residual(Own, x, packed, residual, gate)
    exact = residual.double() + gate.double().unsqueeze(1) * exact_product(x, w).view(residual.shape)
    assert found.shape == composed.shape and found.dtype == composed.dtype
    assert relative_error(found, exact) <= 2 * relative_error(composed, exact)


def test_float16_residuals_stay_finite(generator: torch.Generator) -> None:
    x, w = case(3, 64, 64, torch.float16, generator)
    residual = torch.full((BATCH, 3, 64), 65504.0).half()
    out = product_gate_residual(x, pack_product(w), residual, torch.full((BATCH, 64), 1000.0))
    assert out.isfinite().all() and out.max() == 65504


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "size"), [(3, 64), (2, 128)])
def test_product_norm_rope(heads: int, size: int, dtype: torch.dtype, threads: int, generator: torch.Generator) -> None:
    length = 37
    x, w = case(length, 3 * heads * size, 128, dtype, generator)
    norm_q, norm_k = ((torch.rand(size, generator=generator) + 0.5).to(dtype) for _ in range(2))
    angles = torch.rand(length, size // 2, generator=generator).repeat_interleave(2, dim=1) * 6
    rotary = (angles.cos(), angles.sin())
    packed = pack_product(w, 127)
    found = product_norm_rope(x, packed, norm_q, norm_k, rotary)
    composed = fused.product_norm_rope(Own, x, packed, norm_q, norm_k, rotary)
    exact = exact_product(x, w).view(BATCH, length, 3, heads, size).permute(2, 0, 3, 1, 4)
    for i, (f, c) in enumerate(zip(found, composed, strict=True)):
        assert f.shape == c.shape == (BATCH, heads, length, size) and f.dtype == c.dtype
        e = exact[i]
        if i < 2:
            norm = (norm_q, norm_k)[i].double()
            e = e / (e.square().mean(-1, keepdim=True) + fused.RMS_NORM_EPS).sqrt() * norm
            real, imaginary = e[..., 0::2], e[..., 1::2]
            cos, sin = (t[:, 0::2].double() for t in rotary)
            rotated = (real * cos - imaginary * sin, imaginary * cos + real * sin)
            e = torch.stack(rotated, dim=-1).flatten(-2)
        assert relative_error(f, e) <= 2 * relative_error(c, e)


def test_heads_are_not_cut_by_tiles(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    x, w = case(5, 3 * 2 * 96, 64, torch.bfloat16, generator)
    arguments = (torch.ones(96), torch.ones(96), (torch.ones(5, 96), torch.zeros(5, 96)))
    packed = pack_product(w)
    whole = product_norm_rope(x, packed, *arguments)
    monkeypatch.setattr(product_module, "tile_columns", lambda rows, columns, channels, multiple: multiple)
    assert all(torch.equal(a, b) for a, b in zip(product_norm_rope(x, packed, *arguments), whole, strict=True))


def test_wrong_shapes_are_refused(generator: torch.Generator) -> None:
    x, w = case(5, 64, 64, torch.bfloat16, generator)
    packed = pack_product(w)
    with pytest.raises(FormatError, match="product_gate_residual: 10 rows of 64"):
        product_gate_residual(x, packed, torch.ones(BATCH, 4, 64).bfloat16(), torch.ones(BATCH, 64))
    with pytest.raises(FormatError, match="product_norm_rope: 10 rows of 64"):
        product_norm_rope(x, packed, torch.ones(16), torch.ones(16), (torch.ones(5, 16), torch.ones(5, 16)))
    with pytest.raises(FormatError, match="product_norm_rope: 10 rows of 64"):
        product_norm_rope(x, packed, torch.ones(16), torch.ones(16), (torch.ones(0, 16), torch.ones(0, 16)))
    with pytest.raises(FormatError, match=r"norm_modulate_quantize: expected \(2, 64\)"):
        y = torch.ones(BATCH, 5, 64).bfloat16()
        norm_modulate_quantize(y, torch.ones(1, 64), torch.ones(1, 64), packed_input(w))


def test_gelu_over_its_range() -> None:
    """x where it is large, zero where it is very negative, torch's value between."""
    w = random_weights(64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    zero = torch.zeros_like
    values = [*torch.linspace(-20, 20, 63).tolist(), 3e4]
    w = replace(w, wscales=zero(w.wscales), proj_up=zero(w.proj_up), bias=torch.tensor(values))
    identity = pack_input(InputWeights(torch.ones(64), torch.eye(64), False, "int8"))
    x = quantize(torch.ones(1, 64), packed_input(w))
    found = product_gelu_quantize(x, pack_product(w), identity).lowrank
    assert found is not None
    expected = functional.gelu(w.bias.double(), approximate="tanh")
    torch.testing.assert_close(found[0].double(), expected, rtol=2e-6, atol=1e-7)


def test_the_bound_kernels_are_these() -> None:
    kernels = bind(torch.device("cpu"), "int8")
    assert kernels.backend == "cpu"
    assert kernels.product_norm_rope is product_norm_rope
