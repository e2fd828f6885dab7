"""FLUX.1's shapes on a GPU, with rows that fill no tile: errors against float64, bit-equal repeats."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_triton_fused import exact_heads
from test_triton_quantize import assert_codes
from torch import Tensor
from torch.nn import functional
from triton_cases import adversarial_input, exact_product, input_weights, layer, packed_input, quantized

from support import random_modulation, relative_error
from tonfa.kernels.triton.product import pack_product, product
from tonfa.kernels.triton.product_gate_residual import product_gate_residual
from tonfa.kernels.triton.product_gelu_quantize import product_gelu_quantize
from tonfa.kernels.triton.product_norm_rope import product_norm_rope
from tonfa.kernels.triton.quantize import norm_modulate_quantize, pack_input, quantize
from tonfa.kernels.triton.w4a16 import pack_w4a16, w4a16
from tonfa.ops import fused
from tonfa.ops import quantize as op
from tonfa.ops.activation import QuantizedActivation
from tonfa.weights import W4A16Weights

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
POLICY = "fp8"
ROWS = (1, 17, 255, 512, 4608 + 77)
ERROR = 1e-2
"""Of a product against float64 of the same codes: FP8 tensor cores sum in fewer bits than float32."""


def twice(function: Callable[[], Tensor]) -> Tensor:
    """The result, after the same call has given the same bits."""
    first = function()
    assert torch.equal(first, function())
    return first


@pytest.mark.parametrize(("n", "k"), [(9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288), (768, 256)])
def test_product(n: int, k: int, generator: torch.Generator) -> None:
    w = layer(n, k, 32, CUDA, generator, torch.bfloat16)
    packed = pack_product(w, activations=POLICY)
    for rows in ROWS:
        x = quantized(adversarial_input(rows, k, generator, CUDA, torch.bfloat16), w, POLICY)
        found = twice(lambda x=x: product(x, packed))
        assert relative_error(found, exact_product(x, w, POLICY)) < ERROR


@pytest.mark.parametrize("k", [3072, 12288])
def test_quantize(k: int, generator: torch.Generator) -> None:
    w = input_weights(layer(64, k, 32, CUDA, generator, torch.bfloat16), POLICY)
    packed = pack_input(w)
    for rows in ROWS:
        x = adversarial_input(rows, k, generator, CUDA, torch.bfloat16)
        found, expected = quantize(x, packed), op.reference(x, w)
        assert_codes(found, expected, 1e-4)
        assert found.lowrank is not None and expected.lowrank is not None
        assert relative_error(found.lowrank, expected.lowrank) < 3e-5


def test_norm_modulate_quantize(generator: torch.Generator) -> None:
    w = packed_input(layer(64, 3072, 64, CUDA, generator, torch.bfloat16), POLICY)
    for rows in ROWS:
        x = adversarial_input(rows, 3072, generator, CUDA, torch.bfloat16).unsqueeze(0)
        scale, shift = torch.randn(2, 1, 3072, generator=generator).to(CUDA, torch.bfloat16)
        found = norm_modulate_quantize(x, scale, shift, w)
        expected = quantize(fused.norm_modulate(x.double(), scale.double(), shift.double()).bfloat16(), w)
        assert relative_error(found.codes.float(), expected.codes.float()) < 1e-2
        assert relative_error(values(found), values(expected)) < 1e-2


def values(x: QuantizedActivation) -> Tensor:
    assert x.scales is not None
    return x.codes.float() * x.scales


def test_single_block_with_an_input_of_many_images(generator: torch.Generator) -> None:
    """qkv, fc1, fc2 and the output projection of two images of 333 tokens."""
    batch, length, hidden = 2, 333, 3072
    x = adversarial_input(batch * length, hidden, generator, CUDA, torch.bfloat16)
    residual = torch.randn(batch, length, hidden, generator=generator).to(CUDA, torch.bfloat16)
    gate = torch.randn(batch, hidden, generator=generator).to(CUDA, torch.bfloat16)
    qkv, up = (layer(n, hidden, 32, CUDA, generator, torch.bfloat16) for n in (3 * hidden, 4 * hidden))
    down = layer(hidden, 4 * hidden, 32, CUDA, generator, torch.bfloat16, unsigned=True)

    inputs = quantized(x, qkv, POLICY)
    norms = tuple((torch.rand(128, generator=generator) + 0.5).to(CUDA, torch.bfloat16) for _ in range(2))
    angles = (torch.rand(length, 64, generator=generator).repeat_interleave(2, dim=1) * 6).to(CUDA)
    rotary = (angles.cos(), angles.sin())
    found = product_norm_rope(inputs, pack_product(qkv, activations=POLICY), *norms, rotary)
    for one, exact in zip(found, exact_heads(exact_product(inputs, qkv, POLICY), norms, rotary), strict=True):
        assert relative_error(one, exact) < ERROR

    inputs = quantized(x, up, POLICY)
    hidden_states = product_gelu_quantize(inputs, pack_product(up, activations=POLICY), packed_input(down, POLICY))
    exact = functional.gelu(exact_product(inputs, up, POLICY), approximate="tanh")
    smoothed = exact / down.smooth_factor.double()
    assert relative_error(values(hidden_states), smoothed) < 4e-2  # what e4m3 rounds

    packed = pack_product(down, activations=POLICY)
    out = twice(lambda: product_gate_residual(hidden_states, packed, residual, gate))
    y = exact_product(hidden_states, down, POLICY).view(residual.shape)
    assert relative_error(out, residual.double() + gate.double().unsqueeze(1) * y) < ERROR


@pytest.mark.parametrize("n", [9216, 18432])
def test_w4a16(n: int, generator: torch.Generator) -> None:
    w = random_modulation(n, 3072, generator=generator)
    w = W4A16Weights(*(t.to(CUDA) for t in w.tensors().values()))
    weight, bias = w.dense(torch.float64)
    packed = pack_w4a16(w)
    for batch in (1, 2, 16):
        x = torch.randn(batch, 3072, generator=generator).to(CUDA, torch.bfloat16)
        assert relative_error(twice(lambda x=x: w4a16(x, packed)), x.double() @ weight.T + bias) < 2**-8


def test_in_a_cuda_graph(generator: torch.Generator) -> None:
    """Replayed on new contents of the same input."""
    w = layer(3072, 3072, 32, CUDA, generator, torch.bfloat16)
    inputs, packed = packed_input(w, POLICY), pack_product(w, activations=POLICY)
    x = adversarial_input(300, 3072, generator, CUDA, torch.bfloat16)
    product(quantize(x, inputs), packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(quantize(x, inputs), packed)
    x.copy_(torch.randn(x.shape, generator=generator))
    graph.replay()
    assert torch.equal(out, product(quantize(x, inputs), packed))
