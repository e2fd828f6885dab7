"""The CPU's w4a16 against the reference and float64."""

from __future__ import annotations

import pytest
import torch

from support import random_modulation, relative_error
from tonfa.errors import FormatError
from tonfa.kernels.cpu.w4a16 import pack_w4a16, w4a16
from tonfa.ops import w4a16 as op
from tonfa.weights import FLOAT_DTYPES


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 11])
@pytest.mark.parametrize(("n", "k"), [(200, 64), (768, 1024)])
def test_as_exact_as_the_reference(
    n: int, k: int, batch: int, dtype: torch.dtype, threads: int, generator: torch.Generator
) -> None:
    w = random_modulation(n, k, generator=generator, dtype=dtype)
    x = torch.randn(batch, k, generator=generator).to(dtype)
    weight, bias = w.dense(torch.float64)
    exact = x.double() @ weight.T + bias
    found, plain = w4a16(x, pack_w4a16(w)), op.reference(x, w)
    assert found.shape == plain.shape and found.dtype == plain.dtype
    # A float32 sum in any order is off by some units in its last place: the reference's luck is no measure of it.
    assert relative_error(found, exact) <= max(2 * relative_error(plain, exact), 4 * torch.finfo(torch.float32).eps)


def test_extremes(generator: torch.Generator) -> None:
    """Codes 0 and 15, scales and inputs of zero, negative scales."""
    w = random_modulation(64, 128, generator=generator)
    w.qweight[0], w.qweight[1] = 0, 255
    w.wscales[:, 2], w.wzeros[:, 2] = 0, 0
    w.wscales[:, 3] *= -1
    x = torch.randn(2, 128, generator=generator).bfloat16()
    x[1] = 0
    found = w4a16(x, pack_w4a16(w))
    torch.testing.assert_close(found, op.reference(x, w), rtol=2**-7, atol=2**-7)
    assert torch.equal(found[1], w.bias) and found[0, 2] == w.bias[2]


def test_strided_rows_and_no_rows(generator: torch.Generator) -> None:
    w = random_modulation(64, 64, generator=generator)
    x = torch.randn(3, 128, generator=generator).bfloat16()[:, ::2]
    assert torch.equal(w4a16(x, pack_w4a16(w)), w4a16(x.contiguous(), pack_w4a16(w)))
    assert w4a16(x[:0], pack_w4a16(w)).shape == (0, 64)


def test_a_wrong_input_is_refused(generator: torch.Generator) -> None:
    packed = pack_w4a16(random_modulation(64, 64, generator=generator))
    with pytest.raises(FormatError, match=r"expected x of shape \(B, 64\), got \(2, 32\)"):
        w4a16(torch.ones(2, 32), packed)
