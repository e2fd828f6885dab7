"""The CPU's product: widened weights bit by bit, the whole against float64, ragged shapes, threads, tiles."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import outlier_input, random_weights, relative_error
from tonfa.errors import FormatError
from tonfa.formats import INT4
from tonfa.kernels.cpu import product as cpu
from tonfa.kernels.cpu import widen
from tonfa.kernels.cpu.quantize import pack_input, quantize
from tonfa.ops import product as op
from tonfa.ops.activation import InputWeights, QuantizedActivation
from tonfa.weights import FLOAT_DTYPES, SVDQWeights


def quantized(x: Tensor, w: SVDQWeights) -> QuantizedActivation:
    return quantize(x, pack_input(InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "int8")))


def plain(x: QuantizedActivation, w: SVDQWeights, levels: int, dtype: torch.dtype) -> Tensor:
    """Plain PyTorch in `dtype` arithmetic; in float32 with the kernel's bf16 low-rank branch where it has one."""
    assert x.scales is not None and x.lowrank is not None
    w = w.unshifted()
    codes, scales = op.widen(w, "int8", levels)
    y = (x.codes.to(dtype) * x.scales.to(dtype)) @ (codes.to(dtype) * scales.to(dtype)).T
    if dtype == torch.float32 and x.dtype == w.proj_up.dtype == torch.bfloat16:
        y += (x.lowrank.bfloat16() @ w.proj_up.T).float()
    else:
        y += x.lowrank.to(dtype) @ w.proj_up.to(dtype).T
    y += w.bias.to(dtype)
    return y if dtype == torch.float64 else y.to(x.dtype)


def assert_product(x: Tensor, w: SVDQWeights, levels: int = 127) -> Tensor:
    inputs = quantized(x, w)
    found = cpu.product(inputs, cpu.pack_product(w, levels))
    assert found.shape == (x.shape[0], w.out_features) and found.dtype == x.dtype
    exact = plain(inputs, w, levels, torch.float64)
    assert relative_error(found, exact) <= 2 * relative_error(plain(inputs, w, levels, torch.float32), exact)
    return found


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("levels", [127, 63])
@pytest.mark.parametrize(("n", "k"), [(200, 64), (64, 1024), (1, 128)])
def test_widened_weights_are_the_references(
    n: int, k: int, levels: int, dtype: torch.dtype, threads: int, generator: torch.Generator
) -> None:
    w = random_weights(n, k, 16, generator=generator, dtype=dtype)
    w = replace(w, wscales=w.wscales * torch.where(torch.rand(w.wscales.shape, generator=generator) < 0.5, 1, -1))
    w.qweight[0] = 0
    packed = cpu.pack_product(w, levels)
    codes, scales = op.widen(w, "int8", levels)
    assert torch.equal(packed.row_scales, scales[:, 0])
    for n0 in {0, n // 2}:
        out = torch.empty((n - n0, k), dtype=torch.int8)
        widen.widen(packed.qweight, packed.wscales, packed.row_scales, n0, out)
        assert torch.equal(out, codes[n0:])


@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 4),
    exponent=st.integers(-15, 15),
    dtype=st.sampled_from(FLOAT_DTYPES),
    levels=st.sampled_from((127, 63)),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_widened_weights_are_the_references_at_any_scale(
    n: int, groups: int, exponent: int, dtype: torch.dtype, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = random_weights(n, 64 * groups, 1, generator=generator, dtype=torch.float32)
    floats = {name: t.to(dtype) for name, t in w.tensors().items() if name != "qweight"}
    w = replace(w, **floats | {"wscales": (w.wscales * 2.0**exponent).to(dtype)})
    packed = cpu.pack_product(w, levels)
    out = torch.empty((n, 64 * groups), dtype=torch.int8)
    widen.widen(packed.qweight, packed.wscales, packed.row_scales, 0, out)
    assert torch.equal(out, op.widen(w, "int8", levels)[0])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 200, 64, 16), (7, 192, 192, 32), (300, 200, 1024, 48)])
def test_product_is_as_exact_as_the_reference(
    m: int, n: int, k: int, rank: int, dtype: torch.dtype, threads: int, generator: torch.Generator
) -> None:
    w = random_weights(n, k, rank, generator=generator, dtype=dtype)
    assert_product(outlier_input(m, k, generator, dtype), w)


@pytest.mark.parametrize("levels", [127, 63])
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "after-gelu"])
def test_levels_and_shifted_layers(levels: int, unsigned: bool, generator: torch.Generator) -> None:
    w = random_weights(200, 256, generator=generator, unsigned=unsigned)
    x = outlier_input(33, 256, generator)
    found = assert_product(x, w, levels)
    weight, bias = w.dense(torch.float64)
    assert relative_error(found, x.double() @ weight.T + bias) < 0.05
    torch.testing.assert_close(cpu.pack_product(w).bias, w.unshifted().bias.float(), rtol=1e-5, atol=1e-5)


def test_extreme_weights_and_inputs(generator: torch.Generator) -> None:
    """Codes of -8, negative and zero scales, rows of zeros, one huge channel, full-range pairs of one sign."""
    w = random_weights(64, 128, generator=generator)
    codes = torch.full((64, 128), -8, dtype=torch.int8)
    codes[1] = 7
    wscales = w.wscales.clone()
    wscales[:, 2], wscales[1, 3], wscales[:, 4] = -0.5, -0.25, 0
    w = replace(w, qweight=INT4.pack(codes), wscales=wscales, smooth_factor=torch.ones_like(w.smooth_factor))
    x = torch.ones(5, 128).bfloat16()
    x[1], x[2] = 0, -1
    x[3, 17] = 10000
    found = assert_product(x, w)
    assert torch.equal(found[1], w.bias)


def test_inputs_of_another_dtype_than_the_weights(generator: torch.Generator) -> None:
    w = random_weights(72, 128, generator=generator)
    for dtype in (torch.float16, torch.float32):
        assert_product(torch.randn(9, 128, generator=generator).to(dtype), w)


def test_tiles_give_what_one_tile_gives(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    w = random_weights(200, 128, generator=generator)
    inputs, packed = quantized(outlier_input(37, 128, generator), w), cpu.pack_product(w)
    whole = cpu.product(inputs, packed)
    monkeypatch.setattr(cpu, "tile_columns", lambda rows, columns, channels, multiple: multiple)
    assert torch.equal(cpu.product(inputs, packed), whole)


@pytest.mark.parametrize("rows", [0, 1, 512, 4608, 100_000])
@pytest.mark.parametrize(("columns", "channels"), [(64, 64), (200, 64), (3072, 3072), (9216, 3072), (3072, 15360)])
@pytest.mark.parametrize("multiple", [64, 128])
def test_tile_sizes(rows: int, columns: int, channels: int, multiple: int) -> None:
    width = cpu.tile_columns(rows, columns, channels, multiple)
    assert width >= multiple and width % multiple == 0
    assert width == multiple or width * channels <= (16 << 20) + multiple * channels
    assert width == multiple or width * rows * 4 <= (16 << 20) + multiple * rows * 4
    assert cpu.tile_columns(512, 3072, 3072, 64) == 3072 and cpu.tile_columns(4608, 3072, 3072, 64) == 768


def test_what_is_kept_between_calls_is_bounded(generator: torch.Generator) -> None:
    w = random_weights(256, 128, generator=generator)
    packed = cpu.pack_product(w)
    cpu.product(quantized(outlier_input(300, 128, generator), w), packed)
    held = cpu.WORKSPACE.nbytes()
    assert held == 256 * 128 + 300 * 256 * 4 + 300 * 256 * 2
    cpu.product(quantized(outlier_input(20, 128, generator), w), packed)
    assert cpu.WORKSPACE.nbytes() == held


def test_weights_are_not_copied(generator: torch.Generator) -> None:
    w = random_weights(64, 128, generator=generator)
    packed = cpu.pack_product(w)
    for name in ("qweight", "wscales", "proj_up"):
        assert getattr(packed, name).data_ptr() == getattr(w, name).data_ptr()


def test_weights_in_another_memory_order_and_a_shared_input(generator: torch.Generator) -> None:
    """Linears that read one input get column slices of a joint low-rank part."""
    layers = [random_weights(64, 128, rank, generator=generator) for rank in (16, 32)]
    layers[1] = replace(layers[1], smooth_factor=layers[0].smooth_factor)
    x = outlier_input(9, 128, generator)
    expected = [cpu.product(quantized(x, w), cpu.pack_product(w)) for w in layers]
    joint = InputWeights(layers[0].smooth_factor, torch.cat([w.proj_down for w in layers], 1), False, "int8")
    parts = quantize(x, pack_input(joint)).split((16, 32))
    for part, w, y in zip(parts, layers, expected, strict=True):
        strided = {name: t.T.contiguous().T for name, t in w.tensors().items() if t.ndim == 2}
        assert relative_error(cpu.product(part, cpu.pack_product(replace(w, **strided))), y) < 2**-7


def test_threads_that_call_at_once_do_not_disturb_each_other(generator: torch.Generator) -> None:
    layers = [random_weights(n, 256, generator=generator) for n in (96, 200, 64, 136)]
    inputs = [quantized(outlier_input(m, 256, generator), w) for m, w in zip((5, 64, 33, 120), layers, strict=True)]
    packed = [cpu.pack_product(w) for w in layers]
    expected = [cpu.product(x, w) for x, w in zip(inputs, packed, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            found = pool.map(cpu.product, inputs * 3, packed * 3)
            assert all(torch.equal(a, b) for a, b in zip(found, expected * 3, strict=True))


def test_inference_mode_and_gradients_do_not_mix_up_the_buffers(generator: torch.Generator) -> None:
    w = random_weights(64, 128, generator=generator)
    x = outlier_input(5, 128, generator)
    packed = cpu.pack_product(w)
    with torch.inference_mode():
        first = cpu.product(quantized(x, w), packed).clone()
    y = cpu.product(quantized(x.float().requires_grad_().bfloat16(), w), packed)
    assert torch.equal(y, first) and not y.requires_grad


def test_the_range_is_narrowed_where_int_mm_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As x86 CPUs without VNNI do: u8 times s8 summed in pairs with 16-bit saturation, 128 taken off afterwards."""
    multiply = torch._int_mm

    def saturating(a: Tensor, b: Tensor) -> Tensor:
        products = (a.int() + 128).unsqueeze(2) * b.int().unsqueeze(0)
        pairs = products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1)
        return pairs.sum(1).int() - 128 * b.int().sum(0).int()

    a = torch.randint(-127, 128, (8, 64), dtype=torch.int8)
    b = torch.randint(-63, 64, (64, 8), dtype=torch.int8)
    assert torch.equal(saturating(a, b), multiply(a, b))
    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert widen.exact_levels.__wrapped__() == 63
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).int())
    assert widen.exact_levels.__wrapped__() == 127


def test_wrong_inputs_are_refused(generator: torch.Generator) -> None:
    w, other = (random_weights(64, k, generator=generator) for k in (128, 64))
    x = quantized(outlier_input(5, 64, generator), other)
    with pytest.raises(FormatError, match="the input has 64 channels, the weights have 128"):
        cpu.product(x, cpu.pack_product(w))
    with pytest.raises(ValueError, match="this backend's quantize"):
        cpu.product(replace(x, lowrank=None), cpu.pack_product(other))
    with pytest.raises(FormatError, match="wscales"):
        cpu.pack_product(replace(w, wscales=other.wscales))


def test_no_rows(generator: torch.Generator) -> None:
    w = random_weights(64, 128, generator=generator)
    assert cpu.product(quantized(torch.empty(0, 128).bfloat16(), w), cpu.pack_product(w)).shape == (0, 64)
