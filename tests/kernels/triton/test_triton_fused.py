"""The fused ops against float64 of the composition that they replace, from the same quantized input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from triton_cases import DTYPES, POLICIES, adversarial_input, exact_product, layer, packed_input, quantized

from support import relative_error
from tonfa.errors import FormatError
from tonfa.formats import FP8, INT8
from tonfa.kernels.triton.product import pack_product, product
from tonfa.kernels.triton.product_gate_residual import product_gate_residual
from tonfa.kernels.triton.product_gelu_quantize import product_gelu_quantize
from tonfa.kernels.triton.product_norm_rope import product_norm_rope, product_norm_rope_into
from tonfa.kernels.triton.quantize import quantize
from tonfa.ops import fused
from tonfa.ops.activation import Activations, QuantizedActivation
from tonfa.weights import SVDQWeights

BATCH = 2


class Own:
    """This backend's quantize and product, as the compositions take them."""

    quantize = staticmethod(quantize)
    product = staticmethod(product)


def case(
    length: int,
    n: int,
    k: int,
    activations: Activations,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> tuple[QuantizedActivation, SVDQWeights]:
    w = layer(n, k, 32, device, generator, dtype)
    return quantized(adversarial_input(BATCH * length, k, generator, device, dtype), w, activations), w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", POLICIES)
def test_product_gelu_quantize(
    activations: Activations, dtype: torch.dtype, gpu: str, device: torch.device, generator: torch.Generator
) -> None:
    x, w = case(19, 256, 128, activations, dtype, device, generator)
    following = layer(64, 256, 32, device, generator, dtype, unsigned=True)
    inputs, packed = packed_input(following, activations), pack_product(w, activations=activations)
    found = product_gelu_quantize(x, packed, inputs)
    composed = fused.product_gelu_quantize(Own, x, packed, inputs)
    exact = functional.gelu(exact_product(x, w, activations), approximate="tanh")

    def error(q: QuantizedActivation) -> float:
        assert q.scales is not None
        number_format = FP8 if activations == "fp8" else INT8
        values = number_format.dequantize(q.codes, q.scales, torch.float64)
        return relative_error(values * following.smooth_factor.double(), exact)

    assert error(found) <= 1.1 * error(composed)
    assert found.lowrank is not None and composed.lowrank is not None
    exact_lowrank = exact @ following.proj_down.double()
    limit = max(2 * relative_error(composed.lowrank, exact_lowrank), 3e-7)
    assert relative_error(found.lowrank, exact_lowrank) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize("length", [19, 128])
def test_product_gate_residual(
    length: int,
    activations: Activations,
    dtype: torch.dtype,
    gpu: str,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    x, w = case(length, 200, 128, activations, dtype, device, generator)
    residual = torch.randn(BATCH, length, 200, generator=generator).to(device, dtype)
    gate = torch.randn(BATCH, 600, generator=generator).to(device, dtype)[:, 200:400]
    packed = pack_product(w, activations=activations)
    found = product_gate_residual(x, packed, residual, gate)
    composed = fused.product_gate_residual(Own, x, packed, residual, gate)
    y = exact_product(x, w, activations).view(residual.shape)
    exact = residual.double() + gate.double().unsqueeze(1) * y
    assert found.shape == composed.shape and found.dtype == composed.dtype
    if dtype == torch.float16:
        exact = exact.clamp(-65504, 65504)
    assert relative_error(found, exact) <= max(2 * relative_error(composed, exact), 3e-7)
    with pytest.raises(FormatError, match="product_gate_residual"):
        product_gate_residual(x, packed, residual[:1], gate)


def test_float16_residuals_stay_finite(device: torch.device, generator: torch.Generator) -> None:
    x, w = case(3, 64, 64, "int8", torch.float16, device, generator)
    residual = torch.full((BATCH, 3, 64), 65504.0, device=device).half()
    gate = torch.full((BATCH, 64), 1000.0, device=device)
    out = product_gate_residual(x, pack_product(w, activations="int8"), residual, gate)
    assert out.isfinite().all() and out.max() == 65504


def exact_heads(y: Tensor, norms: tuple[Tensor, Tensor], rotary: fused.Rotary) -> list[Tensor]:
    """float64 (B, H, L, D) of stacked q, k, v (B * L, 3 * H * D)."""
    length, size = rotary[0].shape
    q, k, v = y.unflatten(0, (-1, length)).unflatten(2, (3, -1, size)).unbind(2)
    out = []
    for heads, weight in ((q, norms[0]), (k, norms[1])):
        normed = functional.rms_norm(heads, (size,), weight.double(), fused.RMS_NORM_EPS)
        cos, sin = (t.double().unsqueeze(1) for t in rotary)
        turned = torch.stack((-normed[..., 1::2], normed[..., 0::2]), dim=-1).flatten(-2)
        out.append((normed * cos + turned * sin).transpose(1, 2))
    return [*out, v.transpose(1, 2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize(("heads", "size"), [(3, 64), (1, 128), (5, 16)])
def test_product_norm_rope(
    heads: int,
    size: int,
    activations: Activations,
    dtype: torch.dtype,
    gpu: str,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    """Also as two streams that write into one q, k, v."""
    length = 19
    x, w = case(length, 3 * heads * size, 128, activations, dtype, device, generator)
    norms = tuple((torch.rand(size, generator=generator) + 0.5).to(device, dtype) for _ in range(2))
    angles = (torch.rand(length, size // 2, generator=generator).repeat_interleave(2, dim=1) * 6).to(device)
    rotary = (angles.cos(), angles.sin())
    packed = pack_product(w, activations=activations)
    found = product_norm_rope(x, packed, *norms, rotary)
    composed = fused.product_norm_rope(Own, x, packed, *norms, rotary)
    exact = exact_heads(exact_product(x, w, activations), norms, rotary)
    for one, other, right in zip(found, composed, exact, strict=True):
        assert one.shape == other.shape == (BATCH, heads, length, size) and one.dtype == dtype
        assert relative_error(one, right) <= max(2 * relative_error(other, right), 3e-7)

    out = fused.empty_heads(BATCH, heads, 2 * length + 3, size, dtype, device).fill_(7)
    product_norm_rope_into(x, packed, *norms, rotary, out, length + 3)
    for one, whole in zip(found, out, strict=True):
        assert torch.equal(whole[:, :, length + 3 :], one) and (whole[:, :, : length + 3] == 7).all()
    with pytest.raises(FormatError, match="no place for 38 rows"):
        product_norm_rope_into(x, packed, *norms, rotary, out, length + 4)
    with pytest.raises(FormatError, match="38 rows of .* do not divide"):
        product_norm_rope(x, packed, *norms, (rotary[0][:0], rotary[1][:0]))
