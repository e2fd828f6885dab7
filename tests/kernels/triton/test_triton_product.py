"""Expansion bit by bit; the product against float64 in both memory paths, at ragged sizes, in both residencies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_cases import (
    DTYPES,
    POLICIES,
    adversarial_input,
    exact_product,
    layer,
    packed_input,
    plain_product,
    quantized,
)

from support import outlier_input, relative_error
from tonfa.errors import FormatError, UnsupportedError
from tonfa.kernels.triton import product as module
from tonfa.kernels.triton import tiles
from tonfa.kernels.triton.expand import ExpandTile, expand, row_scales
from tonfa.kernels.triton.product import pack_product, product
from tonfa.kernels.triton.quantize import pack_input, quantize
from tonfa.ops import product as op
from tonfa.ops.activation import Activations, InputWeights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize(("n", "k", "tile"), [(200, 64, ExpandTile()), (40, 1088, ExpandTile(16, 4, 8))])
def test_expanded_weights_are_the_references(
    n: int,
    k: int,
    tile: ExpandTile,
    activations: Activations,
    dtype: torch.dtype,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    w = layer(n, k, 16, device, generator, dtype)
    w = replace(w, wscales=w.wscales * torch.logspace(-3, 3, n, base=2, device=device).to(dtype))
    codes, scales = op.widen(w, activations)
    found = row_scales(w.qweight, w.wscales, codes.dtype)
    assert torch.equal(found, scales[:, 0])
    out = torch.empty((n, k), dtype=codes.dtype, device=device)
    expand(w.qweight, w.wscales, torch.where(found > 0, found.reciprocal(), 0), out, tile)
    assert torch.equal(out.float(), codes.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize(("m", "n", "k", "rank"), [(1, 64, 64, 16), (77, 200, 192, 40), (200, 320, 128, 32)])
def test_product_is_as_exact_as_the_reference(
    m: int,
    n: int,
    k: int,
    rank: int,
    activations: Activations,
    dtype: torch.dtype,
    gpu: str,
    device: torch.device,
    generator: torch.Generator,
) -> None:
    w = layer(n, k, rank, device, generator, dtype, unsigned=k == 192)
    x = quantized(adversarial_input(m, k, generator, device, dtype), w, activations)
    packed = pack_product(w, activations=activations)
    found, exact = product(x, packed), exact_product(x, w, activations)
    assert found.shape == (m, n) and found.dtype == dtype
    # Hopper's FP8 tensor cores sum in fewer bits than float32.
    least = 2e-3 if activations == "fp8" and device.type == "cuda" else 3e-7
    assert relative_error(found, exact) <= max(2 * relative_error(plain_product(x, w, activations), exact), least)
    if m > 1:
        torch.testing.assert_close(found[1].float(), w.unshifted().bias.float(), rtol=1e-2, atol=1e-3)
    assert torch.equal(product(x, packed), found)


def test_float32_layers(device: torch.device, generator: torch.Generator) -> None:
    w = layer(64, 64, 40, device, generator, torch.float32)
    x = quantized(adversarial_input(9, 64, generator, device, torch.float32), w, "int8")
    found, exact = product(x, pack_product(w, activations="int8")), exact_product(x, w, "int8")
    assert relative_error(found, exact) <= max(2 * relative_error(plain_product(x, w, "int8"), exact), 1e-6)


@pytest.mark.parametrize("activations", POLICIES)
def test_expanded_once_or_each_time(activations: Activations, device: torch.device, generator: torch.Generator) -> None:
    w = layer(128, 128, 16, device, generator, torch.float16)
    x = quantized(outlier_input(9, 128, generator, torch.float16).to(device), w, activations)
    kept = pack_product(w, activations, activations=activations)
    assert kept.qweight is None and kept.widened is not None
    expected = product(x, kept)
    assert module.SCRATCH.nbytes() == 0
    packed = pack_product(w, activations=activations)
    assert torch.equal(product(x, packed), expected) and module.SCRATCH.nbytes() == 128 * 128
    assert packed.qweight is not None and packed.qweight.data_ptr() == w.qweight.data_ptr()
    with pytest.raises(UnsupportedError, match="residency='nf4' is unknown; choose 'int4' or "):
        pack_product(w, "nf4", activations=activations)


def test_layers_share_one_buffer(device: torch.device, generator: torch.Generator) -> None:
    layers = [layer(n, 64, 16, device, generator, torch.float16) for n in (64, 192, 128)]
    packed = [pack_product(w, activations="int8") for w in layers]
    inputs = [quantized(outlier_input(5, 64, generator, torch.float16).to(device), w, "int8") for w in layers]
    for x, w, p in zip(inputs, layers, packed, strict=True):
        assert relative_error(product(x, p), exact_product(x, w, "int8")) < 2**-10
    assert module.SCRATCH.nbytes() == 192 * 64


@pytest.mark.parametrize("rank", [0, 8, 80, 256])
def test_every_rank(rank: int, device: torch.device, generator: torch.Generator) -> None:
    w = layer(64, 64, rank, device, generator, torch.float16)
    x = quantized(outlier_input(5, 64, generator, torch.float16).to(device), w, "int8")
    found, exact = product(x, pack_product(w, activations="int8")), exact_product(x, w, "int8")
    assert relative_error(found, exact) < 2**-10


def test_a_shared_input(device: torch.device, generator: torch.Generator) -> None:
    """Linears that read one input get column slices of a joint low-rank part."""
    layers = [layer(64, 128, rank, device, generator, torch.float16) for rank in (16, 32, 8)]
    layers = [replace(w, smooth_factor=layers[0].smooth_factor) for w in layers]
    x = outlier_input(9, 128, generator, torch.float16).to(device)
    joint = InputWeights(layers[0].smooth_factor, torch.cat([w.proj_down for w in layers], 1), False, "int8")
    for part, w in zip(quantize(x, pack_input(joint)).split((16, 32, 8)), layers, strict=True):
        found = product(part, pack_product(w, activations="int8"))
        assert relative_error(found, exact_product(part, w, "int8")) < 2**-10


@pytest.mark.parametrize("capability", sorted(tiles.CANDIDATES))
def test_tiles_fit_the_shape(capability: tuple[int, int]) -> None:
    for m in (1, 512, 4608, 100_000):
        for n, k in ((9216, 3072), (3072, 12288), (64, 64), (192, 320)):
            tile = tiles.choose(capability, 132, m, n, k, 128)
            assert k % tile.block_k == 0 and tile.block_n % 128 == 0 and tile.block_k >= 64
    assert tiles.candidates((8, 7)) == tiles.CANDIDATES[8, 6] and tiles.candidates((13, 0)) == tiles.CANDIDATES[12, 0]


def test_tiles_of_flux_on_an_h200() -> None:
    chosen = {
        (m, n, k): (tile.block_m, tile.block_n)
        for m in (512, 4096, 4608)
        for n, k in ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288))
        for tile in [tiles.choose((9, 0), 132, m, n, k)]
    }
    assert chosen[4608, 9216, 3072] == chosen[4608, 12288, 3072] == chosen[4096, 3072, 3072] == (128, 256)
    assert chosen[4608, 3072, 3072] == chosen[4608, 3072, 12288] == (128, 128)
    assert chosen[512, 3072, 3072] == (128, 128)


def test_wrong_inputs_are_refused(device: torch.device, generator: torch.Generator) -> None:
    w, other = (layer(64, k, 16, device, generator, torch.float16) for k in (128, 64))
    x = quantized(torch.ones(5, 64, device=device).half(), other, "int8")
    with pytest.raises(FormatError, match="the input has 64 channels, the weights have 128"):
        product(x, pack_product(w, activations="int8"))
    with pytest.raises(ValueError, match="this backend's quantize"):
        product(x, pack_product(other, activations="fp8"))
    wide = layer(64, 64, 32, device, generator, torch.float16)
    with pytest.raises(FormatError, match="16 low-rank channels, the weights have 32"):
        product(x, pack_product(wide, activations="int8"))


def test_no_rows(device: torch.device, generator: torch.Generator) -> None:
    w = layer(64, 64, 16, device, generator, torch.float16)
    x = quantize(torch.empty(0, 64, device=device).half(), packed_input(w, "int8"))
    assert product(x, pack_product(w, activations="int8")).shape == (0, 64)
