"""Quantization, with and without LayerNorm, against the references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DTYPES, POLICIES, adversarial_input, input_weights, layer, packed_input

from support import relative_error
from tonfa.errors import FormatError
from tonfa.kernels.triton.device import e4m3_bits
from tonfa.kernels.triton.launch import launch
from tonfa.kernels.triton.quantize import norm_modulate_quantize, pack_input, quantize
from tonfa.ops import fused
from tonfa.ops import quantize as op
from tonfa.ops.activation import Activations, QuantizedActivation

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


def steps(codes: Tensor) -> Tensor:
    """Codes as integers that count representable values."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)


def assert_codes(found: QuantizedActivation, expected: QuantizedActivation, rare: float) -> None:
    """The same scales to their last bits, the same codes but for rare ties."""
    assert found.scales is not None and expected.scales is not None
    assert found.codes.shape == expected.codes.shape and found.codes.dtype == expected.codes.dtype
    torch.testing.assert_close(found.scales, expected.scales, rtol=2**-21, atol=0)
    off = (steps(found.codes) - steps(expected.codes)).abs()
    assert off.max() <= 1 and (off > 0).float().mean() <= rare


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize(("m", "k", "rank"), [(1, 64, 16), (37, 320, 40)])
def test_quantize(
    m: int,
    k: int,
    rank: int,
    activations: Activations,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    w = input_weights(layer(64, k, rank, device, generator, dtype), activations)
    x = adversarial_input(m, k, generator, device, dtype)
    found, expected = quantize(x, pack_input(w)), op.reference(x, w)
    assert_codes(found, expected, 1e-4)
    assert found.lowrank is not None and expected.lowrank is not None and found.lowrank.shape == (m, rank)
    exact = op.reference(x, w, torch.float64).lowrank
    assert exact is not None
    assert relative_error(found.lowrank, exact) <= 2 * relative_error(expected.lowrank, exact) + 1e-6


@pytest.mark.parametrize("activations", POLICIES)
def test_rows_too_small_to_scale_become_zero(
    activations: Activations, device: torch.device, generator: torch.Generator
) -> None:
    w = input_weights(layer(64, 64, 16, device, generator, torch.float32), activations)
    x = torch.full((2, 64), 1e-38, device=device)
    x[1] = 0
    found = quantize(x, pack_input(w))
    assert found.scales is not None
    assert (found.scales == 0).all() and (found.codes.float() == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize("length", [1, 37])
def test_norm_modulate_quantize(
    length: int,
    activations: Activations,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    """Rows far from zero, modulation vectors as chunks of a wider tensor, images that share a block of rows."""
    batch, k = 2, 320
    w = packed_input(layer(64, k, 32, device, generator, dtype), activations)
    x = (adversarial_input(batch * length, k, generator, device, dtype) + 30).view(batch, length, k)
    modulation = torch.randn(batch, 3 * k, generator=generator).to(device, dtype)
    scale, shift = modulation[:, k : 2 * k], modulation[:, 2 * k :]
    found = norm_modulate_quantize(x, scale, shift, w)
    modulated = fused.norm_modulate(x.double(), scale.double(), shift.double()).to(dtype)
    expected = quantize(modulated, w)
    # The mean's last bit decides how a few values are rounded to 16 bits, which scales and codes then show.
    assert found.scales is not None and expected.scales is not None
    torch.testing.assert_close(found.scales, expected.scales, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=0)
    off = (steps(found.codes) - steps(expected.codes)).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 5e-3
    assert found.lowrank is not None and expected.lowrank is not None
    assert relative_error(found.lowrank, expected.lowrank) < max(torch.finfo(dtype).eps / 4, 2e-5)


def test_wide_ranks_take_several_blocks(device: torch.device, generator: torch.Generator) -> None:
    w = input_weights(layer(64, 64, 272, device, generator, torch.float16), "int8")
    x = torch.randn(5, 64, generator=generator).to(device).half()
    found, expected = quantize(x, pack_input(w)), op.reference(x, w)
    assert_codes(found, expected, 1e-4)
    assert found.lowrank is not None and expected.lowrank is not None
    assert relative_error(found.lowrank, expected.lowrank) < 1e-5


def test_no_rank_and_no_rows(device: torch.device, generator: torch.Generator) -> None:
    w = input_weights(layer(64, 64, 0, device, generator, torch.float16), "int8")
    x = torch.randn(5, 64, generator=generator).to(device).half()
    assert_codes(quantize(x, pack_input(w)), op.reference(x, w), 1e-4)
    assert quantize(x[:0], pack_input(w)).codes.shape == (0, 64)


def test_wrong_inputs_are_refused(device: torch.device, generator: torch.Generator) -> None:
    w = packed_input(layer(64, 64, 16, device, generator, torch.float16), "int8")
    with pytest.raises(FormatError, match="expected 64 channels"):
        quantize(torch.ones(2, 32, device=device), w)
    vector = torch.ones(1, 64, device=device)
    with pytest.raises(FormatError, match=r"norm_modulate_quantize: expected \(2, 64\)"):
        norm_modulate_quantize(torch.ones(2, 3, 64, device=device), vector, vector, w)


@triton.jit
def _encode(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, e4m3_bits(tl.load(x + i)).to(tl.uint8))


def test_e4m3_in_integers_is_torchs(device: torch.device, generator: torch.Generator) -> None:
    """Every e4m3 number, the middles between them, subnormal and random ones."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    middles = (codes[1:] + codes[:-1]) / 2
    random = torch.randn(2048, generator=generator) * torch.exp2(torch.randint(-12, 9, (2048,), generator=generator))
    x = torch.cat((codes, middles, middles.nextafter(codes[1:]), random.clamp(-448, 448)))
    x = torch.cat((x, torch.zeros(4096 - len(x)))).to(device)
    out = torch.empty(4096, dtype=torch.uint8, device=device)
    launch(_encode, (1, 1, 1), (x, out, 4096))
    assert torch.equal(out, x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_other_weights_than_the_inputs_dtype(device: torch.device, generator: torch.Generator) -> None:
    w = input_weights(layer(64, 64, 16, device, generator, torch.float16), "int8")
    x = torch.randn(5, 64, generator=generator).to(device)
    found, expected = quantize(x, pack_input(w)), op.reference(x, w)
    assert_codes(found, expected, 1e-3)
    assert found.lowrank is not None and expected.lowrank is not None
    assert relative_error(found.lowrank, expected.lowrank) < 1e-5
    assert found.dtype == torch.float32
