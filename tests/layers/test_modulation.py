"""Modulations: chunks in Diffusers' order, scales with their 1, 4-bit beside 16-bit."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from support import DEVICES, random_modulation, relative_error
from tonfa.errors import FormatError
from tonfa.layers.dense import DenseLinear
from tonfa.layers.modulation import Modulation, W4A16Linear


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
