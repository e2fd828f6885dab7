"""The references against the mathematics in float64, written independently of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from support import outlier_input, random_modulation, random_weights, relative_error
from tonfa.errors import FormatError
from tonfa.formats import GELU_SHIFT
from tonfa.ops import attention, fused, product, quantize, w4a16
from tonfa.ops.activation import ACTIVATIONS, InputWeights, QuantizedActivation
from tonfa.weights import SVDQWeights

QUANTIZATION_ERROR = {"none": 2e-3, "fp8": 5e-2, "int8": 5e-2, "int4": 0.2}
"""Relative error against the exact product of the same weights: what activations (and widened weights) may add."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def run(x: Tensor, w: SVDQWeights, activations: str, dtype: torch.dtype = torch.float32) -> Tensor:
    packed = w if activations == "int4" else w.unshifted()
    inputs = InputWeights(packed.smooth_factor, packed.proj_down, packed.unsigned, activations)
    return product.reference(quantize.reference(x, inputs, dtype), packed, activations, dtype)


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "after-gelu"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_product_approximates_the_dense_linear(activations: str, unsigned: bool, generator: torch.Generator) -> None:
    w = random_weights(192, 256, generator=generator, unsigned=unsigned)
    x = torch.randn(33, 256, generator=generator)
    x = (functional.gelu(x) if unsigned else x).bfloat16()
    weight, bias = w.dense(torch.float64)
    expected = x.double() @ weight.T + bias
    assert relative_error(run(x, w, activations), expected) < QUANTIZATION_ERROR[activations]


def test_dense_form_of_a_shifted_layer_is_exact(generator: torch.Generator) -> None:
    """The layer adds GELU_SHIFT before smoothing; dense() moves that into the bias."""
    w = random_weights(64, 128, generator=generator, unsigned=True)
    x = torch.randn(5, 128, generator=generator).double()
    shifted = (x + GELU_SHIFT) / w.smooth_factor.double() @ w.residual(torch.float64).T
    by_hand = shifted + x @ w.proj_down.double() @ w.proj_up.double().T + w.bias.double()
    weight, bias = w.dense(torch.float64)
    torch.testing.assert_close(x @ weight.T + bias, by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activations", ["int4", "int8"])
def test_smoothing_tames_outlier_channels(activations: str, generator: torch.Generator) -> None:
    """Dividing the large channels leaves finer steps to the others. (A float format has no need of it.)"""
    x = outlier_input(64, 256, generator)
    spans = x.float().abs().amax(0)
    errors = []
    for smooth_factor in (torch.ones(256), spans.sqrt()):
        inputs = InputWeights(smooth_factor.bfloat16(), torch.zeros(256, 16).bfloat16(), False, activations)
        xq = quantize.reference(x, inputs)
        assert xq.scales is not None
        repeats = 256 // xq.scales.shape[1]
        values = xq.codes.float() * xq.scales.float().repeat_interleave(repeats, 1) * inputs.smooth_factor.float()
        errors.append(relative_error(values[:, spans < 10], x[:, spans < 10]))
    assert errors[1] < errors[0]


def test_widening_to_8_bits_is_finer_than_4_bits(generator: torch.Generator) -> None:
    w = random_weights(64, 512, generator=generator)
    exact = w.residual(torch.float64)
    for activations, bound in (("int8", 1e-2), ("fp8", 3e-2)):
        assert relative_error(product.weight(w, activations, torch.float64), exact) < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norm_modulate(dtype: torch.dtype, generator: torch.Generator) -> None:
    x = (torch.randn(2, 7, 96, generator=generator) * 5 + 3).to(dtype)
    scale, shift = (torch.randn(2, 96, generator=generator).to(dtype) for _ in range(2))
    y = x.double()
    normed = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    expected = normed * scale.double()[:, None] + shift.double()[:, None]
    out = fused.norm_modulate(x, scale, shift)
    assert out.dtype == dtype
    assert relative_error(out, expected) < {torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float32: 1e-6}[dtype]


def test_norm_rope_rotates_pairs_by_their_angles(generator: torch.Generator) -> None:
    x = torch.randn(2, 5, 3, 8, generator=generator)
    weight = torch.rand(8, generator=generator) + 0.5
    angles = torch.rand(5, 4, generator=generator) * 6
    cos, sin = (f(angles).repeat_interleave(2, 1) for f in (torch.cos, torch.sin))
    y = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    rotated = torch.view_as_complex(y.unflatten(-1, (4, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles).double(), angles.double()
    ).unsqueeze(1)
    expected = torch.view_as_real(rotated).flatten(-2).transpose(1, 2)
    assert relative_error(fused.norm_rope(x, weight, (cos, sin)), expected) < 1e-6


def test_gate_residual_and_float16_overflow() -> None:
    y, residual = torch.full((1, 2, 4), 60000.0).half(), torch.full((1, 2, 4), 60000.0).half()
    out = fused.gate_residual(y, residual, torch.tensor([[1.0, -1.0, 0.5, 0.0]]).half())
    assert out[0, 0].tolist() == [65504.0, 0.0, 65504.0, 60000.0]


@pytest.mark.parametrize("batch", [1, 5])
def test_w4a16(batch: int, generator: torch.Generator) -> None:
    w = random_modulation(384, 128, generator=generator)
    x = torch.randn(batch, 128, generator=generator).bfloat16()
    codes = torch.stack((w.qweight & 15, w.qweight >> 4), 2).flatten(1).double()
    dense = codes * w.wscales.T.double().repeat_interleave(64, 1) + w.wzeros.T.double().repeat_interleave(64, 1)
    assert relative_error(w4a16.reference(x, w), x.double() @ dense.T + w.bias.double()) < 3e-3


def test_attention_with_and_without_mask(generator: torch.Generator) -> None:
    q, k, v = (torch.randn(2, 3, 11, 16, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 1, 11, generator=generator) > 0.3
    for m in (None, mask):
        scores = q.double() @ k.double().transpose(-1, -2) / 4
        if m is not None:
            scores = scores.masked_fill(~m, float("-inf"))
        expected = (scores.softmax(-1) @ v.double()).transpose(1, 2).flatten(2)
        assert relative_error(attention.reference(q, k, v, m), expected) < 1e-6


def test_fused_product_splits_q_k_v_and_heads(generator: torch.Generator) -> None:
    heads, head_dim, batch, length = 2, 8, 2, 5
    rows = torch.randn(batch * length, 3 * heads * head_dim, generator=generator)

    class Identity:
        quantize = staticmethod(lambda x, w: x)
        product = staticmethod(lambda x, w: x)

    ones, zeros = torch.ones(length, head_dim), torch.zeros(length, head_dim)
    q, k, v = fused.product_norm_rope(Identity, rows, None, torch.ones(head_dim), torch.ones(head_dim), (ones, zeros))
    y = rows.view(batch, length, 3, heads, head_dim)
    normed = functional.rms_norm(y, (head_dim,), eps=1e-6)
    for found, expected in ((q, normed[:, :, 0]), (k, normed[:, :, 1]), (v, y[:, :, 2])):
        torch.testing.assert_close(found, expected.transpose(1, 2))


def test_bad_inputs_are_named(generator: torch.Generator) -> None:
    w = random_weights(64, 128, generator=generator)
    inputs = InputWeights(w.smooth_factor, w.proj_down, False, "int8")
    with pytest.raises(FormatError, match=r"expected 128 channels .* got shape \(3, 64\)"):
        quantize.reference(torch.zeros(3, 64), inputs)
    with pytest.raises(FormatError, match="floating-point dtype, got torch.int64"):
        quantize.reference(torch.zeros(3, 128, dtype=torch.int64), inputs)
    with pytest.raises(FormatError, match="on meta, the weights are on cpu"):
        quantize.reference(torch.zeros(3, 128, device="meta"), inputs)


def test_split_gives_each_linear_its_own_lowrank_columns() -> None:
    x = QuantizedActivation(torch.zeros(2, 4), None, torch.arange(10.0).view(2, 5), torch.float32)
    first, second = x.split((2, 3))
    assert first.lowrank.tolist() == [[0, 1], [5, 6]]
    assert second.lowrank.tolist() == [[2, 3, 4], [7, 8, 9]]
    assert first.codes is x.codes
