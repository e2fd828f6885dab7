"""w4a16, one linear and many in a launch, against the reference and float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from support import random_modulation, relative_error
from tonfa.errors import FormatError
from tonfa.kernels.triton.w4a16 import pack_w4a16, pack_w4a16_group, w4a16, w4a16_group
from tonfa.ops import w4a16 as op
from tonfa.weights import W4A16Weights


def modulation(n: int, k: int, device: torch.device, generator: torch.Generator, dtype: torch.dtype) -> W4A16Weights:
    w = random_modulation(n, k, generator=generator, dtype=dtype)
    w.qweight[0], w.qweight[1] = 0, 255
    w.wscales[:, 3] *= -1
    return replace(w, **{name: t.to(device) for name, t in w.tensors().items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize(("n", "k"), [(200, 64), (40, 320)])
def test_as_exact_as_the_reference(
    n: int, k: int, batch: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    w = modulation(n, k, device, generator, dtype)
    x = torch.randn(batch, k, generator=generator).to(device, dtype)
    x[-1] *= 1e-3
    weight, bias = w.dense(torch.float64)
    exact = x.double() @ weight.T + bias
    found, plain = w4a16(x, pack_w4a16(w)), op.reference(x, w)
    assert found.shape == plain.shape and found.dtype == plain.dtype
    # The interpreter cuts off where it should round to bfloat16.
    least = 2**-7 if dtype == torch.bfloat16 and device.type == "cpu" else 1e-6
    assert relative_error(found, exact) <= max(2 * relative_error(plain, exact), least)


def test_many_linears_in_one_launch(device: torch.device, generator: torch.Generator) -> None:
    weights = [modulation(n, 128, device, generator, torch.float16) for n in (96, 8, 200)]
    x = torch.randn(2, 128, generator=generator).to(device).half()
    found = w4a16_group(x, pack_w4a16_group([pack_w4a16(w) for w in weights]))
    for y, w in zip(found, weights, strict=True):
        assert torch.equal(y, w4a16(x, pack_w4a16(w)))
        assert relative_error(y, op.reference(x, w)) < 2**-10


def test_strided_rows_and_no_rows(device: torch.device, generator: torch.Generator) -> None:
    packed = pack_w4a16(modulation(64, 64, device, generator, torch.float16))
    x = torch.randn(3, 128, generator=generator).to(device).half()[:, ::2]
    assert torch.equal(w4a16(x, packed), w4a16(x.contiguous(), packed))
    assert w4a16(x[:0], packed).shape == (0, 64)


def test_wrong_inputs_are_refused(device: torch.device, generator: torch.Generator) -> None:
    w, other = (modulation(64, k, device, generator, torch.float16) for k in (64, 128))
    with pytest.raises(FormatError, match=r"expected x of shape \(B, 64\), got \(2, 32\)"):
        w4a16(torch.ones(2, 32, device=device), pack_w4a16(w))
    with pytest.raises(FormatError, match="the same in_features, dtype and device"):
        pack_w4a16_group([pack_w4a16(w), pack_w4a16(other)])
