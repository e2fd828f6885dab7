"""Modulations: chunks in Diffusers' order, scales with their 1, 4-bit beside 16-bit."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from support import DEVICES, random_modulation, relative_error
from tonfa.errors import FormatError
from tonfa.layers.dense import DenseLinear
from tonfa.layers.modulation import Modulation, SharedConditioning, W4A16Linear


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("chunks", "scales"), [(3, {1}), (6, {1, 4})])
def test_dense_modulation_adds_one_to_its_scales(chunks: int, scales: set[int], generator: torch.Generator) -> None:
    linear = DenseLinear(64, chunks * 64)
    torch.nn.init.normal_(linear.weight, generator=generator)
    torch.nn.init.normal_(linear.bias, generator=generator)
    x = torch.randn(2, 64, generator=generator)
    vectors = Modulation(64, chunks, linear)(x)
    plain = functional.linear(functional.silu(x), linear.weight, linear.bias).chunk(chunks, dim=1)
    for i, (found, expected) in enumerate(zip(vectors, plain, strict=True)):
        torch.testing.assert_close(found, expected + (i in scales))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 3])
def test_4_bit_modulation_holds_its_one_in_the_bias(batch: int, device: str, generator: torch.Generator) -> None:
    weights = random_modulation(6 * 128, 128, generator=generator)
    linear = W4A16Linear(128, 6 * 128)
    linear.load_state_dict(weights.tensors())
    x = torch.randn(batch, 128, generator=generator).bfloat16()
    weight, bias = weights.dense(torch.float64)
    expected = functional.silu(x).double() @ weight.T + bias
    found = torch.cat(Modulation(128, 6, linear).to(device)(x.to(device)), dim=1)
    assert relative_error(found.cpu(), expected) < 4e-3


def test_channels_must_fit_groups() -> None:
    with pytest.raises(FormatError, match="100 is no multiple of the group size 64"):
        W4A16Linear(100, 64)


def test_a_backend_can_be_named(generator: torch.Generator) -> None:
    linear = W4A16Linear(64, 64)
    linear.load_state_dict(random_modulation(64, 64, generator=generator).tensors())
    default = linear.binding().kernels
    linear.set_backend("int4", "reference")
    assert (linear.binding().kernels.backend, linear.binding().kernels.activations) == ("reference", "int4")
    linear.set_backend("none", None)
    assert linear.binding().kernels is default


def modulations(generator: torch.Generator, device: str = "cpu", count: int = 3) -> list[Modulation]:
    made = []
    for i in range(count):
        linear = W4A16Linear(128, (6 if i % 2 else 3) * 128)
        linear.load_state_dict(random_modulation(linear.out_features, 128, generator=generator).tensors())
        made.append(Modulation(128, linear.out_features // 128, linear).to(device))
    return made


def spied(parts: list[Modulation]) -> list[int]:
    """How many linears each launch for several of them takes."""
    calls: list[int] = []
    kernels = parts[0].linear.binding().kernels

    def group(x, packed):
        found = kernels.w4a16_group(x, packed)
        calls.append(len(found))
        return found

    spying = replace(kernels, w4a16_group=group)
    for part in parts:
        part.linear._binding = replace(part.linear.binding(), kernels=spying)
    return calls


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("batch", [1, 3])
def test_modulations_together_are_those_alone(batch: int, device: str, generator: torch.Generator) -> None:
    parts, shared = modulations(generator, device), SharedConditioning()
    calls = spied(parts)
    for _ in range(2):
        x = torch.randn(batch, 128, generator=generator).bfloat16().to(device)
        for part, joined in zip(parts, shared(parts, x), strict=True):
            assert joined is not None
            for found, alone in zip(part(x, joined), part(x), strict=True):
                assert torch.equal(found, alone)
    assert calls == [3, 3]


def test_weights_that_are_replaced_are_noticed_and_let_go(generator: torch.Generator) -> None:
    parts, shared = modulations(generator), SharedConditioning()
    x = torch.randn(2, 128, generator=generator).bfloat16()
    before = shared(parts, x)[1]
    packed = weakref.ref(parts[2].linear.binding())
    other = random_modulation(parts[1].linear.out_features, 128, generator=generator)
    parts[1].linear.load_state_dict(other.tensors())
    found = shared(parts, x)[1]
    assert not torch.equal(found, before) and torch.equal(found, parts[1].linear(functional.silu(x)))
    parts[0].linear.unbind()
    assert shared._packed == ((), None)
    parts[2].linear.unbind()
    assert packed() is None
    assert copy.deepcopy(shared)._packed == ((), None)


def test_each_computes_its_own_where_weights_are_elsewhere_or_differ(generator: torch.Generator) -> None:
    shared, x = SharedConditioning(), torch.randn(1, 128, generator=generator).bfloat16()
    parts = modulations(generator)
    dense = Modulation(128, 3, DenseLinear(128, 384, dtype=torch.bfloat16))
    assert shared([*parts, dense], x) == [None] * 4
    assert shared([parts[0], copy.deepcopy(parts[1]).to("meta")], x) == [None] * 2
    assert shared([parts[0], copy.deepcopy(parts[1]).half()], x) == [None] * 2
    assert shared([], x) == []
