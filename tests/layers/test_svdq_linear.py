"""SVDQLinear: quantizing a linear, running it under every policy, and following its parameters around."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from support import outlier_input, random_weights, relative_error
from tonfa.errors import FormatError, UnsupportedError
from tonfa.layers.dense import DenseLinear
from tonfa.layers.fused import SharedInput
from tonfa.layers.linear import SVDQLinear
from tonfa.ops.activation import ACTIVATIONS


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def linear(generator: torch.Generator) -> nn.Linear:
    layer = nn.Linear(256, 200)
    with torch.no_grad():
        layer.weight.normal_(std=1 / 16, generator=generator)
        layer.bias.normal_(generator=generator)
    return layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("activations", "bound"), [("none", 0.12), ("int8", 0.12), ("fp8", 0.13), ("int4", 0.2)])
def test_from_linear_approximates_it(
    linear: nn.Linear, activations: str, bound: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    linear = linear.to(dtype)
    layer = SVDQLinear.from_linear(linear, rank=32, activations=activations)
    x = torch.randn(2, 9, 256, generator=generator).to(dtype)
    y = layer(x)
    assert y.shape == (2, 9, 200)
    assert y.dtype == dtype
    with torch.no_grad():
        assert relative_error(y, linear(x)) < bound


def test_more_rank_means_less_error(linear: nn.Linear, generator: torch.Generator) -> None:
    x = torch.randn(64, 256, generator=generator)
    with torch.no_grad():
        expected = linear(x)
    errors = [
        relative_error(SVDQLinear.from_linear(linear, rank=r, activations="none")(x), expected) for r in (16, 64, 128)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_linear_without_bias(generator: torch.Generator) -> None:
    linear = nn.Linear(128, 64, bias=False)
    layer = SVDQLinear.from_linear(linear, rank=16, activations="none")
    assert layer.bias.eq(0).all()
    assert layer(torch.zeros(3, 128)).eq(0).all()


def test_one_row_and_one_vector_give_what_a_batch_gives(generator: torch.Generator) -> None:
    layer = SVDQLinear.from_weights(random_weights(96, 128, generator=generator))
    x = outlier_input(4, 128, generator)
    batch = layer(x)
    assert relative_error(layer(x[:1]), batch[:1]) < 5e-3
    assert layer(x[2]).shape == (96,)
    assert relative_error(layer(x[2]), batch[2]) < 5e-3


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_copies_and_pickles_compute_the_same(activations: str, generator: torch.Generator) -> None:
    layer = SVDQLinear.from_weights(random_weights(96, 128, generator=generator), activations=activations)
    x = outlier_input(4, 128, generator)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)


def test_new_weights_are_seen_after_loading_and_casting(generator: torch.Generator) -> None:
    first, second = (random_weights(96, 128, generator=generator) for _ in range(2))
    layer = SVDQLinear.from_weights(first)
    x = outlier_input(4, 128, generator)
    before = layer(x)
    layer.load_state_dict({name: t.clone() for name, t in second.tensors().items()})
    assert torch.equal(layer(x), SVDQLinear.from_weights(second)(x))
    assert not torch.equal(layer(x), before)
    half = layer.to(torch.float16)(x.to(torch.float16))
    assert half.dtype == torch.float16
    assert layer.qweight.dtype == torch.uint8
    assert relative_error(half, layer.to(torch.bfloat16)(x)) < 2e-2


def test_replaced_parameters_are_seen(generator: torch.Generator) -> None:
    """Offloading hooks put new parameters in place without telling the module."""
    first, second = (random_weights(96, 128, generator=generator) for _ in range(2))
    layer, x = SVDQLinear.from_weights(first), outlier_input(4, 128, generator)
    layer(x)
    for name, tensor in second.tensors().items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    assert torch.equal(layer(x), SVDQLinear.from_weights(second)(x))


def test_policy_can_be_changed_and_is_checked(generator: torch.Generator) -> None:
    layer = SVDQLinear.from_weights(random_weights(96, 128, generator=generator), activations="int4")
    x = outlier_input(4, 128, generator)
    coarse = layer(x)
    layer.set_activations("none")
    assert not torch.equal(layer(x), coarse)
    with pytest.raises(UnsupportedError, match="activations='int3' is unknown; choose one of int4, int8, fp8, none"):
        layer.set_activations("int3")
    layer.set_activations("int4", backend="nothing")
    with pytest.raises(UnsupportedError, match="backend='nothing' is unknown"):
        layer(x)
    layer.set_activations("fp8", backend="cpu")
    with pytest.raises(UnsupportedError, match="cpu: activations='fp8' is not among its int8"):
        layer(x)


def test_a_residency_that_is_unknown_or_missing_is_refused(linear: nn.Linear) -> None:
    layer = SVDQLinear.from_linear(linear, rank=16, activations="int8")
    with pytest.raises(UnsupportedError, match="weights='int2' is unknown; choose one of int4, fp8"):
        layer.set_weights("int2")
    layer.set_weights("fp8")
    x = torch.randn(3, linear.in_features, dtype=linear.weight.dtype)
    with pytest.raises(UnsupportedError, match="multiplies 4-bit weights only"):
        layer(x)
    layer.set_weights("int4")
    assert layer(x).isfinite().all()


def test_sizes_that_cannot_be_are_refused(linear: nn.Linear) -> None:
    with pytest.raises(FormatError, match="100 is no multiple of the group size 64"):
        SVDQLinear(100, 64)
    with pytest.raises(ValueError, match="rank"):
        SVDQLinear.from_linear(linear, rank=4096)
    layer = SVDQLinear.from_linear(linear)
    with pytest.raises(FormatError, match="expected 256 channels"):
        layer(torch.zeros(2, 128))


def test_misshapen_weights_are_named(generator: torch.Generator) -> None:
    good = random_weights(96, 128, generator=generator).tensors()
    from tonfa.weights import SVDQWeights

    for name, tensor in good.items():
        with pytest.raises(FormatError, match=f"SVDQLinear.{name}: expected"):
            SVDQLinear.from_weights(SVDQWeights(**{**good, name: tensor[None]}))


@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_shared_input_equals_separate_inputs(activations: str, generator: torch.Generator) -> None:
    from dataclasses import replace

    first = random_weights(96, 128, 32, generator=generator)
    second = replace(random_weights(160, 128, 16, generator=generator), smooth_factor=first.smooth_factor)
    third = random_weights(64, 128, 16, generator=generator)
    x = outlier_input(10, 128, generator).view(2, 5, 128)
    scale, shift = (torch.randn(2, 128, generator=generator).bfloat16() for _ in range(2))
    for pair in ((first, second), (first, third)):
        layers = [SVDQLinear.from_weights(w, activations=activations) for w in pair]
        shared = SharedInput(*layers).norm_modulate_quantize(x, scale, shift)
        for layer, joint in zip(layers, shared, strict=True):
            alone = layer.norm_modulate_quantize(x, scale, shift)
            assert torch.equal(joint.codes, alone.codes)
            assert relative_error(layer.product(joint), layer.product(alone)) < 5e-3


def test_dense_linear_is_torchs(linear: nn.Linear, generator: torch.Generator) -> None:
    layer = DenseLinear(256, 200)
    layer.load_state_dict(linear.state_dict())
    x = torch.randn(2, 3, 256, generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x))
