"""The references against tensors of the published format and outputs of the published engine's own kernels.

`truth.*` are logical values, `io.*` test vectors: `q`, `ascales`, `lora_act` and `y_kernel` come from the engine's CUDA
kernels, `y_ideal` is float64 without intermediate rounding.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from support import DATA, relative_error
from tonfa.formats import INT4
from tonfa.ops import fused, product, quantize
from tonfa.ops.activation import InputWeights, QuantizedActivation
from tonfa.weights import SVDQWeights


def weights(truth: dict[str, Tensor], unsigned: bool = False) -> SVDQWeights:
    w = SVDQWeights(
        INT4.pack(truth["codes"]),
        truth["scales"],
        truth["smooth"],
        truth["down"],
        truth["up"],
        truth["bias"],
        unsigned=unsigned,
    )
    w.check()
    return w


def section(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}


def inputs(w: SVDQWeights) -> InputWeights:
    return InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "int4")


def assert_codes_agree(found: Tensor, expected: Tensor) -> None:
    """All but ties are equal: the engine divides by an approximate reciprocal."""
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() >= 0.9999


@pytest.mark.parametrize("name", ["w4a4_128x128_r32", "w4a4_256x192_r32"])
def test_linear(name: str) -> None:
    tensors = load_file(DATA / f"{name}.safetensors")
    w, io = weights(section(tensors, "truth")), section(tensors, "io")
    k = w.in_features
    x = quantize.reference(io["x"], inputs(w))
    assert_codes_agree(x.codes, io["q"][:, :k])
    assert torch.equal(x.scales, io["ascales"][:, : k // 64])
    assert relative_error(x.lowrank, io["lora_act"]) < 1e-6

    given_codes = QuantizedActivation(io["q"][:, :k], io["ascales"][:, : k // 64], io["lora_act"], torch.bfloat16)
    y = product.reference(given_codes, w, "int4")
    assert relative_error(y, io["y_kernel"][:, : w.out_features]) < 5e-3
    assert relative_error(product.reference(x, w, "int4"), io["y_ideal"][:, : w.out_features]) < 3e-2


def test_gelu_mlp() -> None:
    tensors = load_file(DATA / "mlp_gelu_128_512_128.safetensors")
    up, down = weights(section(tensors, "truth1")), weights(section(tensors, "truth2"), unsigned=True)
    io = section(tensors, "io")

    class Reference:
        quantize = staticmethod(quantize.reference)

        @staticmethod
        def product(x: QuantizedActivation, w: SVDQWeights) -> Tensor:
            return product.reference(x, w, "int4")

    h = fused.gelu(Reference.product(quantize.reference(io["x"], inputs(up)), up))
    assert relative_error(h, io["h"]) < 1.5e-2
    x2 = quantize.reference(io["h"], inputs(down))
    assert_codes_agree(x2.codes, io["q2"])
    assert torch.equal(x2.scales, io["ascales2"])
    given_codes = QuantizedActivation(io["q2"], io["ascales2"], io["lora_act2"], torch.bfloat16)
    assert relative_error(Reference.product(given_codes, down), io["y_kernel"]) < 1e-2

    end_to_end = fused.product_gelu_quantize(Reference, quantize.reference(io["x"], inputs(up)), up, inputs(down))
    assert relative_error(Reference.product(end_to_end, down), io["y_ideal"]) < 5e-2
