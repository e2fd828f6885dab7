"""The packing against tensors packed by the published writer: exact, both ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from support import DATA, relative_error
from tonfa.checkpoint import nunchaku_layout as layout
from tonfa.errors import FormatError
from tonfa.formats import UINT4
from tonfa.ops import w4a16
from tonfa.weights import W4A16Weights

LINEARS = [
    ("w4a4_128x128_r32", "packed", "truth"),
    ("w4a4_256x192_r32", "packed", "truth"),
    ("mlp_gelu_128_512_128", "fc1", "truth1"),
    ("mlp_gelu_128_512_128", "fc2", "truth2"),
]


@pytest.mark.parametrize(("file", "packed", "truth"), LINEARS)
def test_linears(file: str, packed: str, truth: str) -> None:
    tensors = load_file(DATA / f"{file}.safetensors")
    stored = {name: tensors[f"{packed}.{name}"] for name in ("qweight", "wscales", "bias", "smooth")}
    logical = {name: tensors[f"{truth}.{name}"] for name in ("codes", "scales", "bias", "smooth", "down", "up")}
    n, k = logical["codes"].shape
    assert torch.equal(layout.unpack_codes(stored["qweight"], n, k), logical["codes"])
    assert torch.equal(layout.pack_codes(logical["codes"]), stored["qweight"])
    assert torch.equal(layout.unpack_scales(stored["wscales"], k // 64, n), logical["scales"])
    assert torch.equal(layout.pack_scales(logical["scales"]), stored["wscales"])
    for name, size in (("bias", n), ("smooth", k)):
        assert torch.equal(layout.unpack_vector(stored[name], size), logical[name])
        assert torch.equal(layout.pack_vector(logical[name]), stored[name])
    for name, size, down in (("down", k, True), ("up", n, False)):
        matrix = tensors[f"{packed}.lora_{name}"]
        assert torch.equal(layout.unpack_lowrank(matrix, size, down=down), logical[name])
        assert torch.equal(layout.pack_lowrank(logical[name], down=down), matrix)


@pytest.mark.parametrize("file", ["awq_adanorm_zero_6x128_1024", "awq_adanorm_zero_6x128_256_padded_groups"])
def test_modulations(file: str) -> None:
    """Codes and scales exactly; the linear's output as the published engine's kernel gives it."""
    t = load_file(DATA / f"{file}.safetensors")
    n, k = t["truth.codes"].shape
    codes = layout.unpack_w4a16_codes(t["packed.qweight"], n, k)
    assert torch.equal(layout.pack_w4a16_codes(codes), t["packed.qweight"])
    in_order = layout.separate_rows(codes, 6, 0)
    assert torch.equal(in_order.to(torch.int8) - 7, t["truth.codes"])
    assert torch.equal(layout.interleave_rows(in_order, 6, 0), codes)
    scales, zeros = (layout.separate_rows(t[f"packed.{s}"][: k // 64], 6, 1) for s in ("wscales", "wzeros"))
    assert torch.equal(scales, t["truth.scales"][: k // 64])
    bias = layout.separate_rows(t["packed.bias"], 6, 0)
    y = w4a16.reference(t["io.x"], W4A16Weights(UINT4.pack(in_order), scales, zeros, bias))
    chunks = y.unflatten(1, (6, -1)).transpose(0, 1)
    assert relative_error(chunks, t["io.chunks"]) < 1e-2
    assert relative_error(layout.interleave_rows(y, 6, 1), t.get("io.y_kernel", t["io.y_engine"])) < 1e-2
    plain = y.float().unflatten(1, (6, -1))
    plain[:, [1, 4]] -= 1  # the 1 of "1 + scale", which the stored bias holds
    assert relative_error(plain.flatten(1), t["io.y_ideal"]) < 1e-2


@given(n=st.integers(1, 300), groups=st.integers(1, 5), rank=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_every_size_round_trips(n: int, groups: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k, r = 64 * groups, 16 * rank
    codes = torch.randint(-8, 8, (n, k), generator=generator, dtype=torch.int8)
    assert torch.equal(layout.unpack_codes(layout.pack_codes(codes), n, k), codes)
    scales, vector = torch.randn(groups, n, generator=generator), torch.randn(n, generator=generator)
    assert torch.equal(layout.unpack_scales(layout.pack_scales(scales), groups, n), scales)
    assert torch.equal(layout.unpack_vector(layout.pack_vector(vector), n), vector)
    matrix = torch.randn(n, r, generator=generator)
    for down in (True, False):
        assert torch.equal(layout.unpack_lowrank(layout.pack_lowrank(matrix, down=down), n, down=down), matrix)
    unsigned = (codes[: n // 4 * 4] + 8).to(torch.uint8)
    if len(unsigned):
        back = layout.unpack_w4a16_codes(layout.pack_w4a16_codes(unsigned), len(unsigned), k)
        assert torch.equal(back, unsigned)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(FormatError, match=r"qweight: expected packed shape \(128, 64\), got \(64, 64\)"):
        layout.unpack_codes(torch.zeros(64, 64, dtype=torch.int8), 100, 128)
    with pytest.raises(FormatError, match="rank 24 is no multiple of 16"):
        layout.unpack_lowrank(torch.zeros(128, 24), 128, down=True)
