"""The catalog holds what a FLUX model starts, found by calling its ops with tensors that have shapes and no memory."""

from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed, which the backend needs")

from tonfa.kernels import hopper
from tonfa.kernels.cuda.kernel import Kernel, Struct
from tonfa.kernels.hopper import catalog, inputs, packed_product, product, product_norm_rope, quantize
from tonfa.kernels.hopper.product_norm_rope_fp8 import product_norm_rope_fp8
from tonfa.ops.activation import InputWeights, ScaledFP8
from tonfa.ops.fused import Projection, empty_heads
from tonfa.weights import SVDQWeights

HIDDEN, MLP, RANK, HEADS = 3072, 12288, 32, 24
META = torch.device("meta")


class Layer:
    """A linear of N x K, packed."""

    def __init__(self, n: int, k: int, dtype: torch.dtype) -> None:
        floats = (
            torch.empty(shape, dtype=dtype, device=META) for shape in ((k // 64, n), (k,), (k, RANK), (n, RANK), n)
        )
        w = SVDQWeights(torch.empty(n, k // 2, dtype=torch.uint8, device=META), *floats)
        self.input = inputs.pack_input(InputWeights(w.smooth_factor, w.proj_down, False, "fp8"))
        self.product = packed_product.pack_product(w)


def step(rows: int, dtype: torch.dtype, layers: dict[str, Layer]) -> None:
    """The ops of a block for so many tokens, with either attention."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META)

    x, vector, norm = empty(1, rows, HIDDEN), empty(1, HIDDEN), empty(128)
    rotary = (empty(rows, 128, dtype=torch.float32), empty(rows, 128, dtype=torch.float32))
    qkv, out, up, down = layers.values()
    quantized = quantize.norm_modulate_quantize(x, vector, vector, qkv.input)
    heads = empty_heads(1, HEADS, rows, 128, dtype, META)
    product_norm_rope.product_norm_rope_into(quantized, qkv.product, norm, norm, rotary, heads, 0)
    assert product_norm_rope_fp8([Projection(quantized, qkv.product, norm, norm, rotary)]) is not None
    unit, center = empty(1, dtype=torch.float32), empty(HIDDEN)
    codes = ScaledFP8(empty(1, rows, HIDDEN, dtype=torch.float8_e4m3fn), unit, center, dtype)
    for attended in (quantize.quantize(x, out.input), quantize.quantize_fp8(codes, out.input)):
        product.product_gate_residual(attended, out.product, x, vector)
    quantized = quantize.norm_modulate_quantize(x, vector, vector, up.input)
    product.product_gate_residual(
        product.product_gelu_quantize(quantized, up.product, down.input), down.product, x, vector
    )


@pytest.mark.parametrize("multiprocessors", [132, 114])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_holds_what_a_model_starts(
    dtype: torch.dtype, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = set()

    def launch(kernel: Kernel, device: torch.device, grid: tuple[int, ...], *parameters: Struct) -> None:
        started.add(kernel)

    for module in pkgutil.iter_modules(hopper.__path__, "tonfa.kernels.hopper."):
        loaded = importlib.import_module(module.name)
        for name, replacement in (
            ("launch", launch),
            ("latest", lambda device: (0, None)),
            ("multiprocessors", lambda device: multiprocessors),
        ):
            if hasattr(loaded, name):
                monkeypatch.setattr(loaded, name, replacement)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    sizes = {"qkv": (3 * HIDDEN, HIDDEN), "out": (HIDDEN, HIDDEN), "up": (MLP, HIDDEN), "down": (HIDDEN, MLP)}
    layers = {name: Layer(*shape, dtype) for name, shape in sizes.items()}
    for rows in catalog.token_counts():
        step(rows, dtype, layers)
    assert started == set(catalog.kernels(multiprocessors, [dtype]))


def test_pictures_and_texts_are_counted() -> None:
    """1024 x 1024 pixels are 4096 tokens, 768 x 1344 are 48 x 84; texts are of 256 or 512 tokens."""
    counts = catalog.token_counts()
    assert {256, 512, 1024, 4096, 4096 + 512, 4096 + 256, 48 * 84 + 512, 96 * 96 + 512} <= set(counts)
    assert max(counts) == 96 * 96 + 512
