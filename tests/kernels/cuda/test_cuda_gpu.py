"""The CUDA kernels on a GPU, against float64 and against the references in float32 on the CPU.

Run `pytest -m gpu tests/kernels/cuda` on sm_80, sm_86, sm_89 or (emulated) sm_90.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support import DATA, outlier_input, random_modulation, random_weights, relative_error
from tonfa.checkpoint import nunchaku_layout as layout
from tonfa.dispatch import bind
from tonfa.errors import FormatError
from tonfa.formats import INT4, UINT4
from tonfa.kernels.cuda import compiler
from tonfa.kernels.cuda import launch as launch_module
from tonfa.kernels.cuda.norm_modulate_quantize import norm_modulate_quantize
from tonfa.kernels.cuda.primitives import Primitives
from tonfa.kernels.cuda.product import pack_product, product
from tonfa.kernels.cuda.product_gate_residual import product_gate_residual
from tonfa.kernels.cuda.product_gelu_quantize import product_gelu_quantize
from tonfa.kernels.cuda.product_norm_rope import product_norm_rope, product_norm_rope_into
from tonfa.kernels.cuda.quantize import pack_activation, pack_input, quantize, unpack_activation
from tonfa.kernels.cuda.w4a16 import pack_w4a16, w4a16, w4a16_group
from tonfa.layers.linear import SVDQLinear
from tonfa.ops import fused
from tonfa.ops import product as product_op
from tonfa.ops import quantize as quantize_op
from tonfa.ops.activation import InputWeights, QuantizedActivation
from tonfa.weights import SVDQWeights, W4A16Weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(compiler.problem() is not None, reason=compiler.problem() or ""),
    pytest.mark.usefixtures("poisoned"),
]
DTYPES = [torch.bfloat16, torch.float16]
GPU = "cuda"
BATCH = 2

FLUX = [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)]
"""(N, K) of FLUX's quantized linears."""
DEMO = [(768, 256), (256, 256), (1024, 256), (256, 1024)]
"""The same of the demo model."""


def on_gpu(w: SVDQWeights) -> SVDQWeights:
    return replace(w, **{name: t.to(GPU) for name, t in w.tensors().items()})


def input_weights(w: SVDQWeights) -> InputWeights:
    return InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "int4")


def to_gpu(x: QuantizedActivation) -> QuantizedActivation:
    assert x.scales is not None and x.lowrank is not None
    return pack_activation(QuantizedActivation(x.codes.to(GPU), x.scales.to(GPU), x.lowrank.to(GPU), x.dtype))


def quantized(x: Tensor, w: SVDQWeights) -> QuantizedActivation:
    """Of tensors on the GPU."""
    return quantize(x, pack_input(input_weights(w)))


def plain(x: QuantizedActivation, w: SVDQWeights, dtype: torch.dtype) -> Tensor:
    """The product of this backend's activation in `dtype` arithmetic; float32 rounds lowrank as the kernel does."""
    x = unpack_activation(x, w.unsigned)
    if dtype == torch.float32:
        x = replace(x, lowrank=x.lowrank.to(x.dtype).float())
    return product_op.reference(x, w, "int4", dtype)


def assert_quantized(x: Tensor, w: SVDQWeights) -> QuantizedActivation:
    """Codes and scales are the reference's, bit by bit; lowrank differs by the order of its sums."""
    found = quantized(x.to(GPU), on_gpu(w))
    expected = quantize_op.reference(x, input_weights(w))
    unpacked = unpack_activation(found, w.unsigned)
    assert torch.equal(unpacked.scales.cpu(), expected.scales)
    assert torch.equal(unpacked.codes.cpu(), expected.codes)
    exact = x.double() @ w.proj_down.double()
    assert found.lowrank.shape == exact.shape
    assert not exact.numel() or relative_error(found.lowrank.cpu(), exact) < 2e-6
    return found


def assert_product(x: QuantizedActivation, w: SVDQWeights) -> Tensor:
    found = product(x, pack_product(w))
    exact = plain(x, w, torch.float64)
    assert found.shape == exact.shape and found.dtype == x.dtype
    assert relative_error(found, exact) <= 2 * relative_error(plain(x, w, torch.float32), exact)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "after-gelu"])
@pytest.mark.parametrize("rows", [1, 2, 15, 32, 33, 130])
@pytest.mark.parametrize("k", [64, 192, 1024])
def test_quantize(k: int, rows: int, unsigned: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    w = random_weights(64, k, generator=generator, unsigned=unsigned, dtype=dtype)
    x = outlier_input(rows, k, generator, dtype)
    assert_quantized(x.abs() if unsigned else x, w)


@pytest.mark.parametrize("rank", [*range(16, 257, 16), 0, 5, 512])
def test_ranks(rank: int, generator: torch.Generator) -> None:
    w = random_weights(192, 320, rank, generator=generator)
    x = assert_quantized(outlier_input(37, 320, generator), w)
    assert_product(x, on_gpu(w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "after-gelu"])
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 31, 33, 127, 128, 129, 300])
@pytest.mark.parametrize(("n", "k"), [(8, 64), (64, 128), (72, 192), (128, 256), (200, 320), (202, 384), (1, 448)])
def test_product(n: int, k: int, rows: int, unsigned: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    w = on_gpu(random_weights(n, k, generator=generator, unsigned=unsigned, dtype=dtype))
    assert_product(quantized(outlier_input(rows, k, generator, dtype).to(GPU), w), w)


@pytest.mark.parametrize(("n", "k"), FLUX + DEMO)
@pytest.mark.parametrize("rows", [512, 1000])
def test_shapes_of_models(n: int, k: int, rows: int, generator: torch.Generator) -> None:
    w = random_weights(n, k, generator=generator, unsigned=k > n)
    assert_product(assert_quantized(outlier_input(rows, k, generator), w), on_gpu(w))


def test_a_whole_image(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(9216, 3072, generator=generator))
    assert_product(quantized(outlier_input(4608, 3072, generator).to(GPU), w), w)


@pytest.mark.parametrize("unsigned", [False, True], ids=["s4", "u4"])
def test_integers_are_exact(unsigned: bool, generator: torch.Generator) -> None:
    """Scales of one, no branch, no bias: sums of the largest codes come out to the last bit."""
    w = random_weights(128, 64, generator=generator, unsigned=unsigned, dtype=torch.float16)
    zeros = {name: torch.zeros_like(getattr(w, name)) for name in ("proj_up", "bias")}
    w = replace(w, wscales=torch.ones_like(w.wscales), **zeros)
    codes = torch.randint(0, 16, (128, 64), generator=generator, dtype=torch.uint8)
    if not unsigned:
        codes = codes.to(torch.int8) - 8
    codes[0], w.qweight[0] = codes.max(), 0x88
    x = QuantizedActivation(codes, torch.ones(128, 1).half(), torch.zeros(128, 32), torch.float16)
    found = product(to_gpu(x), pack_product(on_gpu(w)))
    assert torch.equal(found.cpu(), (codes.int() @ w.codes().int().t()).half())
    assert found.abs().max() >= 64 * 8 * 7


@pytest.mark.parametrize("name", ["w4a4_128x128_r32", "w4a4_256x192_r32"])
def test_published_linear(name: str) -> None:
    tensors = load_file(DATA / f"{name}.safetensors")
    truth, io = (
        {k.removeprefix(p): t.to(GPU) for k, t in tensors.items() if k.startswith(p)} for p in ("truth.", "io.")
    )
    w = SVDQWeights(INT4.pack(truth["codes"]), *(truth[n] for n in ("scales", "smooth", "down", "up", "bias")))
    x = quantized(io["x"], w)
    k = w.in_features
    codes = unpack_activation(x, False).codes.int()
    assert (codes - io["q"][:, :k].int()).abs().max() <= 1 and (codes == io["q"][:, :k]).float().mean() >= 0.9999
    assert torch.equal(x.scales, io["ascales"][:, : k // 64])
    assert relative_error(x.lowrank, io["lora_act"]) < 2e-6
    given = QuantizedActivation(io["q"][:, :k], io["ascales"][:, : k // 64], io["lora_act"], torch.bfloat16)
    found = product(pack_activation(given), pack_product(w))
    assert relative_error(found, io["y_kernel"][:, : w.out_features]) < 5e-3
    exact = product_op.reference(given, w, "int4", torch.float64)
    assert relative_error(found, exact) < relative_error(io["y_kernel"][:, : w.out_features], exact)


@pytest.mark.parametrize("name", ["awq_adanorm_zero_6x128_1024", "awq_adanorm_zero_6x128_256_padded_groups"])
def test_published_modulation(name: str) -> None:
    """The weights of an adaptive norm, against the outputs of the published engine's kernel."""
    t = load_file(DATA / f"{name}.safetensors")
    k = t["io.x"].shape[1]
    scales, zeros = (layout.separate_rows(t[f"packed.{s}"][: k // 64], 6, 1) for s in ("wscales", "wzeros"))
    codes = layout.separate_rows(layout.unpack_w4a16_codes(t["packed.qweight"], 6 * 128, k), 6, 0)
    w = W4A16Weights(UINT4.pack(codes), scales, zeros, layout.separate_rows(t["packed.bias"], 6, 0))
    w = W4A16Weights(**{name: tensor.to(GPU) for name, tensor in w.tensors().items()})
    x = t["io.x"].to(GPU)
    found = w4a16(x, pack_w4a16(w)).cpu()
    published = layout.separate_rows(t.get("io.y_kernel", t["io.y_engine"]), 6, 1)
    assert relative_error(found, published) < 1e-2
    weight, bias = w.dense(torch.float64)
    exact = (x.double() @ weight.T + bias).cpu()
    assert relative_error(found, exact) <= relative_error(published, exact)


def test_published_gelu_mlp() -> None:
    tensors = {name: t.to(GPU) for name, t in load_file(DATA / "mlp_gelu_128_512_128.safetensors").items()}

    def weights(name: str, unsigned: bool) -> SVDQWeights:
        floats = (tensors[f"{name}.{n}"] for n in ("scales", "smooth", "down", "up", "bias"))
        return SVDQWeights(INT4.pack(tensors[f"{name}.codes"]), *floats, unsigned=unsigned)

    up, down = weights("truth1", False), weights("truth2", True)
    x = quantized(tensors["io.x"], up)
    hidden = product_gelu_quantize(x, pack_product(up), pack_input(input_weights(down)))
    found = product(hidden, pack_product(down))
    assert relative_error(found, tensors["io.y_ideal"]) < 5e-2
    assert relative_error(found, tensors["io.y_kernel"]) < 5e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "n", "rank"), [(300, 1024, 0), (1, 64, 16), (130, 192, 32), (300, 1024, 80), (257, 640, 256)]
)
def test_product_gelu_quantize(rows: int, n: int, rank: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    w = on_gpu(random_weights(n, 256, generator=generator, dtype=dtype))
    following = on_gpu(random_weights(64, n, rank, generator=generator, unsigned=True, dtype=dtype))
    packed, packed_next = pack_product(w), pack_input(input_weights(following))
    x = quantized(outlier_input(rows, 256, generator, dtype).to(GPU) / 8, w)
    found = product_gelu_quantize(x, packed, packed_next)
    composed = fused.product_gelu_quantize(Primitives, x, packed, packed_next)
    codes, expected = (unpack_activation(each, True).codes.int() for each in (found, composed))
    assert (codes - expected).abs().max() <= 1 and (codes != expected).float().mean() < 2e-3
    assert relative_error(found.scales, composed.scales) < 2**-9
    exact = fused.gelu(plain(x, w, torch.float64)).double() @ following.proj_down.double()
    assert found.lowrank.shape == exact.shape
    assert rank == 0 or relative_error(found.lowrank, exact) <= 2 * relative_error(composed.lowrank, exact)
    assert_product(found, following)


def test_gelu_over_its_range(generator: torch.Generator) -> None:
    """The bias alone goes through GELU; an identity as proj_down shows the result."""
    values = torch.cat((torch.linspace(-12, 12, 61), torch.tensor([-3e4, 3e4, 0.0]))).half()
    w = random_weights(64, 64, 16, generator=generator, dtype=torch.float16)
    w = on_gpu(replace(w, wscales=torch.zeros_like(w.wscales), proj_up=torch.zeros_like(w.proj_up), bias=values))
    identity = InputWeights(torch.ones(64, device=GPU).half(), torch.eye(64, device=GPU).half(), True, "int4")
    x = quantized(torch.ones(1, 64, device=GPU).half(), w)
    found = product_gelu_quantize(x, pack_product(w), pack_input(identity)).lowrank
    torch.testing.assert_close(found[0], fused.gelu(values.double()).float().to(GPU), rtol=2**-10, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "n"), [(1, 128), (37, 200), (150, 3072), (65, 202)])
def test_product_gate_residual(length: int, n: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    w = on_gpu(random_weights(n, 192, generator=generator, dtype=dtype))
    x = quantized(outlier_input(BATCH * length, 192, generator, dtype).to(GPU), w)
    residual = torch.randn(BATCH, length, n, generator=generator).to(GPU, dtype)
    gate = torch.randn(BATCH, n, generator=generator).to(GPU, dtype)
    packed = pack_product(w)
    found = product_gate_residual(x, packed, residual, gate)
    composed = fused.product_gate_residual(Primitives, x, packed, residual, gate)
    exact = residual.double() + gate.double().unsqueeze(1) * plain(x, w, torch.float64).view(residual.shape)
    assert found.shape == composed.shape and found.dtype == composed.dtype
    assert relative_error(found, exact) <= 2 * relative_error(composed, exact)
    torch.testing.assert_close(found, composed, rtol=2 * torch.finfo(dtype).eps, atol=0.05)


def test_float16_residuals_stay_finite(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(64, 64, generator=generator, dtype=torch.float16))
    x = quantized(outlier_input(BATCH * 3, 64, generator, torch.float16).to(GPU), w)
    residual, gate = (
        torch.full(shape, v, device=GPU).half() for shape, v in (((BATCH, 3, 64), 65504), ((BATCH, 64), 1000))
    )
    out = product_gate_residual(x, pack_product(w), residual, gate)
    assert out.isfinite().all() and out.max() == 65504


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "heads", "size"), [(1, 1, 128), (37, 2, 128), (300, 3, 128), (20, 2, 64)])
def test_product_norm_rope(length: int, heads: int, size: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    w = on_gpu(random_weights(3 * heads * size, 128, generator=generator, dtype=dtype))
    x = quantized(outlier_input(BATCH * length, 128, generator, dtype).to(GPU), w)
    norm_q, norm_k = ((torch.rand(size, generator=generator) + 0.5).to(GPU, dtype) for _ in range(2))
    angles = torch.rand(length, size // 2, generator=generator).repeat_interleave(2, dim=1) * 6
    rotary = (angles.cos().to(GPU), angles.sin().to(GPU))
    packed = pack_product(w)
    found = product_norm_rope(x, packed, norm_q, norm_k, rotary)
    composed = fused.product_norm_rope(Primitives, x, packed, norm_q, norm_k, rotary)
    exact = plain(x, w, torch.float64).view(BATCH, length, 3, heads, size).permute(2, 0, 3, 1, 4)
    for i, (f, c) in enumerate(zip(found, composed, strict=True)):
        assert f.shape == c.shape == (BATCH, heads, length, size) and f.dtype == c.dtype
        e = exact[i]
        if i < 2:
            e = e / (e.square().mean(-1, keepdim=True) + fused.RMS_NORM_EPS).sqrt() * (norm_q, norm_k)[i].double()
            cos, sin = (t[:, 0::2].double() for t in rotary)
            real, imaginary = e[..., 0::2], e[..., 1::2]
            e = torch.stack((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1).flatten(-2)
        assert relative_error(f, e) <= 2 * relative_error(c, e)
        torch.testing.assert_close(f, c.contiguous(), rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("skip", [0, 1], ids=["aligned", "misaligned"])
def test_heads_are_written_to_their_place(skip: int, generator: torch.Generator) -> None:
    """Between other tokens, in either order of heads and tokens; the others' memory stays as it was."""
    length, total, offset = 37, 50, 9
    w = on_gpu(random_weights(3 * 2 * 128, 128, generator=generator))
    x = quantized(outlier_input(BATCH * length, 128, generator).to(GPU), w)
    norms = (torch.rand(2, 128, generator=generator) + 0.5).to(GPU, torch.bfloat16)
    angles = torch.rand(length, 64, generator=generator).repeat_interleave(2, dim=1) * 6
    rotary = (angles.cos().to(GPU), angles.sin().to(GPU))
    packed = pack_product(w)
    expected = torch.stack(product_norm_rope(x, packed, *norms, rotary))
    for order in ((3, BATCH, 2, total, 128), (3, BATCH, total, 2, 128)):
        storage = torch.full((skip + 3 * BATCH * 2 * total * 128,), 7.0, device=GPU, dtype=torch.bfloat16)
        heads = storage[skip:].view(order)
        heads = heads if order[3] == total else heads.transpose(2, 3)
        product_norm_rope_into(x, packed, *norms, rotary, heads, offset)
        torch.testing.assert_close(heads[:, :, :, offset : offset + length], expected, rtol=0.02, atol=0.02)
        if skip == 0:
            assert torch.equal(heads[:, :, :, offset : offset + length], expected)
        assert (heads[:, :, :, :offset] == 7).all() and (heads[:, :, :, offset + length :] == 7).all()
    with pytest.raises(FormatError, match=r"heads: expected torch.bfloat16 of shape \(3, 2, 2, 37, 128\)"):
        product_norm_rope_into(x, packed, *norms, rotary, heads, total - length + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "k", "rank"), [(1, 64, 16), (37, 256, 32), (70, 3072, 64), (33, 320, 96)])
def test_norm_modulate_quantize(length: int, k: int, rank: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    w = on_gpu(random_weights(64, k, rank, generator=generator, dtype=dtype))
    x = (outlier_input(BATCH * length, k, generator, torch.float32) + 5).view(BATCH, length, k).to(GPU, dtype)
    scale, shift = ((torch.randn(BATCH, k, generator=generator) + one).to(GPU, dtype) for one in (1, 0))
    packed = pack_input(input_weights(w))
    found = norm_modulate_quantize(x, scale, shift, packed)
    composed = fused.norm_modulate_quantize(Primitives, x, scale, shift, packed)
    codes, expected = (unpack_activation(each, False).codes.int() for each in (found, composed))
    assert (codes - expected).abs().max() <= 1 and (codes != expected).float().mean() < 5e-3
    assert relative_error(found.scales, composed.scales) < 2**-9
    normed = torch.nn.functional.layer_norm(x.double(), (k,), eps=fused.LAYER_NORM_EPS)
    exact = (normed * scale.double().unsqueeze(1) + shift.double().unsqueeze(1)).flatten(0, 1) @ w.proj_down.double()
    assert relative_error(found.lowrank, exact) <= 2 * relative_error(composed.lowrank, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "k", "batch"), [(1, 64, 1), (18, 128, 3), (192, 1088, 1), (18432, 3072, 1), (768, 256, 8)]
)
def test_w4a16(n: int, k: int, batch: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    w = random_modulation(n, k, generator=generator, dtype=dtype)
    w = W4A16Weights(**{name: t.to(GPU) for name, t in w.tensors().items()})
    x = outlier_input(batch, k, generator, dtype).to(GPU)
    weight, bias = w.dense(torch.float64)
    exact = x.double() @ weight.T + bias
    found = w4a16(x, pack_w4a16(w))
    assert found.shape == (batch, n) and found.dtype == dtype
    weight, bias = w.dense(torch.float32)
    rounded = (x.float() @ weight.T + bias).to(dtype)
    assert relative_error(found, exact) <= 2 * relative_error(rounded, exact) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sizes", "k", "batch"), [((130, 8, 18), 192, 6), ((8,) * 81, 64, 2), ((18432, 9216) * 38, 3072, 1)], ids=str
)
def test_w4a16_group_equals_its_linears(
    sizes: tuple[int, ...], k: int, batch: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    distinct = {n: random_modulation(n, k, generator=generator, dtype=dtype) for n in sizes}
    packed = []
    for i, n in enumerate(sizes):
        w = distinct[n]
        w = replace(w, bias=w.bias + i)
        packed.append(pack_w4a16(W4A16Weights(**{name: t.to(GPU) for name, t in w.tensors().items()})))
    x = outlier_input(batch, k, generator, dtype).to(GPU)
    found = w4a16_group(x, packed)
    assert len(found) == len(packed)
    for y, w in zip(found, packed, strict=True):
        assert torch.equal(y, w4a16(x, w))
    with pytest.raises(FormatError, match="linears of one launch need the same in_features, dtype and device"):
        w4a16_group(x, [*packed, pack_w4a16(random_modulation(8, k + 64, generator=generator, dtype=dtype))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "after-gelu"])
def test_adversarial_inputs(unsigned: bool, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Zeros, one huge channel, subnormal numbers, ties: codes and scales to the bit, each row's product to rounding."""
    w = random_weights(64, 128, generator=generator, dtype=dtype, unsigned=unsigned)
    w = replace(w, proj_down=w.proj_down / 64, wscales=w.wscales / 64)
    number = torch.finfo(dtype)
    x = outlier_input(40, 128, generator, dtype)
    huge = min(number.max / 8, 1e31)  # more than 1e32 is NaN: see device/product.cuh
    x[0], x[1, :64], x[2, 0] = 0, 0, huge
    x[3], x[4] = number.tiny * 64, number.tiny / 4
    x[5] = torch.where(torch.arange(128) % 2 == 0, 1.0, -1.0).to(dtype)
    x[6], x[7], x[8] = 7, 3.5, -0.0
    x[9], x[9, 70] = number.tiny, huge
    x = x.abs() if unsigned else x
    expected = quantize_op.reference(x, input_weights(w))
    given = quantized(x.to(GPU), on_gpu(w))
    found = unpack_activation(given, unsigned)
    assert torch.equal(found.scales.cpu(), expected.scales) and torch.equal(found.codes.cpu(), expected.codes)
    y = product(given, pack_product(on_gpu(w)))
    exact, rounded = (plain(given, on_gpu(w), arithmetic) for arithmetic in (torch.float64, torch.float32))
    assert y.isfinite().all()
    for row in range(40):
        assert relative_error(y[row], exact[row]) <= 2 * relative_error(rounded[row], exact[row]) + number.eps / 8


@pytest.mark.parametrize("length", [1, 517])
def test_fused_shapes_of_flux(length: int, generator: torch.Generator) -> None:
    """What a block runs, with the token counts of odd pictures: fused as composed."""
    up, down = (on_gpu(random_weights(n, k, generator=generator, unsigned=k > n)) for n, k in (FLUX[2], FLUX[3]))
    qkv, out = (on_gpu(random_weights(n, k, generator=generator)) for n, k in (FLUX[0], FLUX[1]))
    residual = outlier_input(BATCH * length, 3072, generator).view(BATCH, length, 3072).to(GPU)
    scale, shift, gate = torch.randn(3, BATCH, 3072, generator=generator).to(GPU, torch.bfloat16)
    angles = torch.rand(length, 64, generator=generator).repeat_interleave(2, dim=1) * 6
    rotary = (angles.cos().to(GPU), angles.sin().to(GPU))
    norms = (torch.rand(2, 128, generator=generator) + 0.5).to(GPU, torch.bfloat16)

    packed_in = pack_input(input_weights(up))
    x = norm_modulate_quantize(residual, scale, shift, packed_in)
    composed = fused.norm_modulate_quantize(Primitives, residual, scale, shift, packed_in)
    codes = [unpack_activation(each, False).codes.int() for each in (x, composed)]
    assert (codes[0] - codes[1]).abs().max() <= 1 and (codes[0] != codes[1]).float().mean() < 5e-3
    assert relative_error(x.lowrank, composed.lowrank) < 5e-3

    for w in (qkv, out):
        assert_product(x, w)
    heads = product_norm_rope(x, pack_product(qkv), *norms, rotary)
    for found, expected in zip(
        heads, fused.product_norm_rope(Primitives, x, pack_product(qkv), *norms, rotary), strict=True
    ):
        assert found.shape == (BATCH, 24, length, 128) and relative_error(found, expected) < 2**-8
    packed_up, packed_down, following = pack_product(up), pack_product(down), pack_input(input_weights(down))
    hidden = product_gelu_quantize(x, packed_up, following)
    composed = fused.product_gelu_quantize(Primitives, x, packed_up, following)
    codes = [unpack_activation(each, True).codes.int() for each in (hidden, composed)]
    assert (codes[0] - codes[1]).abs().max() <= 1 and (codes[0] != codes[1]).float().mean() < 2e-3
    assert relative_error(hidden.lowrank, composed.lowrank) < 1e-3
    assert_product(hidden, down)
    for w, y in ((pack_product(out), x), (packed_down, hidden)):
        found = product_gate_residual(y, w, residual, gate)
        expected = fused.product_gate_residual(Primitives, y, w, residual, gate)
        assert relative_error(found, expected) < 2**-8


def test_a_row_of_nan_stays_alone(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(128, 256, generator=generator))
    x = outlier_input(70, 256, generator).to(GPU)
    clean = product(quantized(x, w), pack_product(w))
    for row, value in ((3, torch.nan), (40, torch.inf)):
        x[row, 17] = value
    dirty = product(quantized(x, w), pack_product(w))
    others = torch.ones(70, dtype=torch.bool, device=GPU)
    others[[3, 40]] = False
    assert torch.equal(dirty[others], clean[others])
    assert dirty[3].isnan().all() and not dirty[40].isfinite().any()


def test_results_do_not_change_from_run_to_run(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(1024, 512, generator=generator))
    following = pack_input(input_weights(on_gpu(random_weights(64, 1024, generator=generator, unsigned=True))))
    x = outlier_input(700, 512, generator).to(GPU)
    packed = pack_product(w)
    first = None
    for _ in range(5):
        hidden = product_gelu_quantize(quantized(x, w), packed, following)
        results = (product(quantized(x, w), packed), hidden.codes, hidden.scales, hidden.lowrank)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def test_a_shared_input_is_quantized_once(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(128, 256, generator=generator))
    joint = InputWeights(w.smooth_factor, torch.cat((w.proj_down, w.proj_down), dim=1), False, "int4")
    x = outlier_input(50, 256, generator).to(GPU)
    halves = quantize(x, pack_input(joint)).split((32, 32))
    expected = product(quantized(x, w), pack_product(w))
    assert all(torch.equal(product(half, pack_product(w)), expected) for half in halves)


@pytest.mark.parametrize("loaded", [True, False], ids=["loaded-before", "loaded-while-capturing"])
def test_a_cuda_graph_replays_them(loaded: bool, generator: torch.Generator) -> None:
    w = on_gpu(random_weights(256, 256, generator=generator))
    following_weights = on_gpu(random_weights(128, 256, generator=generator, unsigned=True))
    packed, packed_in = pack_product(w), pack_input(input_weights(w))
    following, packed_next = pack_input(input_weights(following_weights)), pack_product(following_weights)

    def run(x: Tensor) -> Tensor:
        return product(product_gelu_quantize(quantize(x, packed_in), packed, following), packed_next)

    x = outlier_input(60, 256, generator).to(GPU)
    run(x)
    if not loaded:
        launch_module._function.cache_clear()
        launch_module._library.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(x)
    for _ in range(2):
        x.copy_(outlier_input(60, 256, generator))
        graph.replay()
        assert torch.equal(out, run(x))


def test_streams_and_threads(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(256, 256, generator=generator))
    packed, packed_in = pack_product(w), pack_input(input_weights(w))
    x = outlier_input(60, 256, generator).to(GPU)
    expected = product(quantize(x, packed_in), packed)
    torch.cuda.synchronize()
    found: list[Tensor] = []

    def run() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found.append(product(quantize(x, packed_in), packed))
        stream.synchronize()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(f, expected) for f in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(256, 256, generator=generator))
    x = outlier_input(60, 256, generator).to(GPU)
    expected = product(quantized(x, w), pack_product(w))
    other = replace(w, **{name: t.to("cuda:1") for name, t in w.tensors().items()})
    found = product(quantized(x.to("cuda:1"), other), pack_product(other))
    assert found.device.index == 1 and torch.equal(found.to(GPU), expected)


def test_no_rows_are_no_error(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(128, 256, generator=generator))
    x = quantized(torch.empty(0, 256, dtype=torch.bfloat16, device=GPU), w)
    assert product(x, pack_product(w)).shape == (0, 128)
    following = pack_input(input_weights(on_gpu(random_weights(64, 128, generator=generator, unsigned=True))))
    assert product_gelu_quantize(x, pack_product(w), following).codes.shape == (0, 64)


def test_wrong_inputs_are_refused_before_a_launch(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(128, 256, generator=generator))
    packed, packed_in = pack_product(w), pack_input(input_weights(w))
    x = outlier_input(6, 256, generator).to(GPU)
    with pytest.raises(FormatError, match="quantize: the input is torch.float16, the weights are torch.bfloat16"):
        quantize(x.half(), packed_in)
    with pytest.raises(FormatError, match="input is on cpu, the weights are on cuda:0"):
        quantize(x.cpu(), packed_in)
    quantized_x = quantize(x, packed_in)
    with pytest.raises(FormatError, match="residual: expected torch.bfloat16 of shape"):
        product_gate_residual(quantized_x, packed, x.view(2, 3, 256), x[:2, :128])
    with pytest.raises(FormatError, match="are no multiples of 4 tokens"):
        product_norm_rope(quantized_x, packed, x[0], x[0], (torch.ones(4, 128), torch.ones(4, 128)))
    torch.cuda.synchronize()


def test_misaligned_and_strided_inputs_are_copied(generator: torch.Generator) -> None:
    w = on_gpu(random_weights(128, 256, generator=generator))
    x = outlier_input(10, 256, generator).to(GPU)
    storage = torch.empty(10 * 256 + 1, dtype=torch.bfloat16, device=GPU)
    storage[1:] = x.flatten()
    wide = torch.cat((x, x), dim=1)[:, :256]
    expected = quantized(x, w)
    for other in (storage[1:].view(10, 256), wide):
        found = quantized(other, w)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "after-gelu"])
def test_a_layer_gives_what_the_reference_backend_gives(unsigned: bool, generator: torch.Generator) -> None:
    w = on_gpu(random_weights(192, 256, generator=generator, unsigned=unsigned))
    x = outlier_input(21, 256, generator).view(3, 7, 256).to(GPU)
    layer = SVDQLinear.from_weights(w, activations="int4", backend="cuda")
    found = layer(x)
    kernels = layer.binding().kernels
    assert kernels.backend == "cuda" and kernels.product is bind(torch.device(GPU), "int4", "cuda").product
    layer.set_activations("int4", backend="reference")
    assert found.shape == (3, 7, 192)
    assert relative_error(found, layer(x)) < 2**-7
