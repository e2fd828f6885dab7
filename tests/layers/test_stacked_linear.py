"""StackedLinear: three linears with smoothing factors of their own, against the three apart."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from support import outlier_input, random_weights, relative_error
from tonfa.dispatch import BACKENDS
from tonfa.errors import FormatError
from tonfa.layers.fused import SharedInput
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.stacked import StackedLinear
from tonfa.ops import fused
from tonfa.ops.activation import ACTIVATIONS

CASES = [
    pytest.param(backend.name, activations, id=f"{backend.name}-{activations}")
    for backend in BACKENDS
    for activations in ACTIVATIONS
    if activations in backend.activations
    and (backend.reason_against(torch.device("cpu"), activations) or backend.missing()) is None
]
HIDDEN, HEAD = 128, 64


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def stacked(generator: torch.Generator, backend: str | None = None, activations: str | None = None) -> StackedLinear:
    weights = [random_weights(HIDDEN, HIDDEN, 16, generator=generator) for _ in range(3)]
    return StackedLinear(SVDQLinear.from_weights(w, activations=activations, backend=backend) for w in weights)


def apart(layer: StackedLinear, x: Tensor) -> Tensor:
    return torch.cat([part(x) for part in layer.parts], dim=-1)


@pytest.mark.parametrize(("backend", "activations"), CASES)
def test_every_step_is_that_of_its_parts(backend: str, activations: str, generator: torch.Generator) -> None:
    layer = stacked(generator, backend, activations)
    x = outlier_input(2 * 5, HIDDEN, generator).view(2, 5, HIDDEN)
    expected = apart(layer, x)
    assert (layer.in_features, layer.out_features) == (HIDDEN, 3 * HIDDEN)
    assert torch.equal(layer(x), expected)

    scale, shift, gate = (torch.randn(2, n, generator=generator).bfloat16() for n in (HIDDEN, HIDDEN, 3 * HIDDEN))
    normed = fused.norm_modulate(x, scale, shift)
    found = layer.product(layer.norm_modulate_quantize(x, scale, shift))
    assert torch.equal(found.view(2, 5, -1), apart(layer, normed))

    residual = torch.randn(2, 5, 3 * HIDDEN, generator=generator).bfloat16()
    found = layer.product_gate_residual(layer.quantize(x), residual, gate)
    assert torch.equal(found, fused.gate_residual(expected, residual, gate))

    following = SVDQLinear.from_weights(
        random_weights(64, 3 * HIDDEN, 16, generator=generator), activations=activations, backend=backend
    )
    found = following.product(layer.product_gelu_quantize(layer.quantize(x), following))
    assert torch.equal(
        found.view(2, 5, -1), following(functional.gelu(expected.float(), approximate="tanh").bfloat16())
    )


@pytest.mark.parametrize(("backend", "activations"), CASES)
def test_q_k_and_v_are_those_of_three_linears(backend: str, activations: str, generator: torch.Generator) -> None:
    layer = stacked(generator, backend, activations)
    x = outlier_input(2 * 5, HIDDEN, generator).view(2, 5, HIDDEN)
    norms = [torch.rand(HEAD, generator=generator).bfloat16() + 0.5 for _ in range(2)]
    angles = torch.rand(5, HEAD // 2, generator=generator).repeat_interleave(2, dim=1)
    rotary = (angles.cos(), angles.sin())
    found = layer.product_norm_rope(layer.quantize(x), *norms, rotary)
    heads = [part(x).unflatten(2, (-1, HEAD)) for part in layer.parts]
    expected = [fused.norm_rope(y, norm, rotary) for y, norm in zip(heads[:2], norms, strict=True)]
    for tensor, wanted in zip(found, [*expected, heads[2].transpose(1, 2)], strict=True):
        assert torch.equal(tensor, wanted)


def test_its_weights_stand_for_the_linear_that_it_computes(generator: torch.Generator) -> None:
    layer = stacked(generator, activations="none").float()
    x = torch.randn(7, HIDDEN, generator=generator)
    assert relative_error(layer(x), functional.linear(x, *layer.weights().dense())) < 1e-5


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_shared_input_leaves_it_to_quantize_for_itself(activations: str, generator: torch.Generator) -> None:
    layer = stacked(generator, activations=activations)
    other = SVDQLinear.from_weights(random_weights(64, HIDDEN, 16, generator=generator), activations=activations)
    x = outlier_input(5, HIDDEN, generator)[None]
    scale, shift = torch.randn(2, 1, HIDDEN, generator=generator).bfloat16()
    inputs = SharedInput(layer, other).norm_modulate_quantize(x, scale, shift)
    for linear, quantized in zip((layer, other), inputs, strict=True):
        assert torch.equal(linear.product(quantized), linear.product(linear.norm_modulate_quantize(x, scale, shift)))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_copies_and_replaced_parameters(activations: str, generator: torch.Generator) -> None:
    layer, x = stacked(generator, activations=activations), outlier_input(4, HIDDEN, generator)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    other = stacked(generator, activations=activations)
    layer.load_state_dict({name: t.clone() for name, t in other.state_dict().items()})
    assert torch.equal(layer(x), other(x)) and not torch.equal(layer(x), expected)
    for policy in ("none", activations):
        layer.parts[0].set_activations(policy)
        assert layer.binding() is layer.parts[0].binding()
        assert layer.binding().kernels.activations == policy


def test_wrong_parts_and_inputs(generator: torch.Generator) -> None:
    narrow = SVDQLinear.from_weights(random_weights(64, 64, 16, generator=generator))
    layer = stacked(generator)
    with pytest.raises(FormatError, match=r"its parts read \[64, 128\] channels"):
        StackedLinear([narrow, *layer.parts])
    with pytest.raises(FormatError, match="a quantized input for each part"):
        layer.product(layer.parts[0].quantize(torch.zeros(1, HIDDEN)))
