"""Wrong inputs: an exception that names value and remedy, and no launch. Without a GPU: nothing may be launched."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support import outlier_input, random_modulation, random_weights
from tonfa.errors import FormatError, TonfaError
from tonfa.kernels.cuda.norm_modulate_quantize import norm_modulate_quantize
from tonfa.kernels.cuda.product import pack_product, product
from tonfa.kernels.cuda.product_gate_residual import product_gate_residual
from tonfa.kernels.cuda.product_gelu_quantize import product_gelu_quantize
from tonfa.kernels.cuda.product_norm_rope import product_norm_rope
from tonfa.kernels.cuda.quantize import pack_activation, pack_input, quantize
from tonfa.kernels.cuda.w4a16 import pack_w4a16, w4a16
from tonfa.ops import quantize as quantize_op
from tonfa.ops.activation import InputWeights
from tonfa.weights import SVDQWeights, W4A16Weights

OPS = ("quantize", "norm_modulate_quantize", "product", "product_gelu_quantize", "product_gate_residual")
OPS = (*OPS, "product_norm_rope", "w4a16")
ROWS, K, N = 6, 128, 384


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    for op in OPS:
        module = importlib.import_module(f"tonfa.kernels.cuda.{op}")
        monkeypatch.setattr(module, "launch", lambda kernel, *_: names.append(kernel.name))
    properties = SimpleNamespace(multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return names


def inputs_of(w: SVDQWeights) -> InputWeights:
    return InputWeights(w.smooth_factor, w.proj_down, w.unsigned, "int4")


def given(generator: torch.Generator) -> SimpleNamespace:
    w = random_weights(N, K, generator=generator)
    following = random_weights(64, N, generator=generator, unsigned=True)
    modulation = random_modulation(N, K, generator=generator)
    x = outlier_input(ROWS, K, generator)
    return SimpleNamespace(
        x=x,
        q=pack_activation(quantize_op.reference(x, inputs_of(w))),
        w=pack_product(w),
        inputs=pack_input(inputs_of(w)),
        following=pack_input(inputs_of(following)),
        modulation=pack_w4a16(modulation),
        residual=torch.zeros(2, 3, N, dtype=torch.bfloat16),
        gate=torch.zeros(2, N, dtype=torch.bfloat16),
        scale=torch.ones(2, K, dtype=torch.bfloat16),
        norms=(torch.ones(128), torch.ones(128)),
        rotary=(torch.ones(3, 128), torch.ones(3, 128)),
    )


def quantized(g: SimpleNamespace) -> Any:
    return quantize(g.x, g.inputs)


def normed(g: SimpleNamespace) -> Any:
    return norm_modulate_quantize(g.x.view(2, 3, -1), g.scale, g.scale, g.inputs)


def plain(g: SimpleNamespace) -> Any:
    return product(g.q, g.w)


def gelu(g: SimpleNamespace) -> Any:
    return product_gelu_quantize(g.q, g.w, g.following)


def heads(g: SimpleNamespace) -> Any:
    return product_norm_rope(g.q, g.w, *g.norms, g.rotary)


def gated(g: SimpleNamespace) -> Any:
    return product_gate_residual(g.q, g.w, g.residual, g.gate)


def modulated(g: SimpleNamespace) -> Any:
    return w4a16(g.x, g.modulation)


META = torch.device("meta")
WRONG: list[tuple[Callable[[SimpleNamespace], Any], dict[str, Callable[[SimpleNamespace], Any]], str]] = [
    (quantized, {"x": lambda g: g.x.half()}, "input is torch.float16, the weights are torch.bfloat16; convert"),
    (quantized, {"x": lambda g: g.x.float()}, "input is torch.float32"),
    (quantized, {"x": lambda g: g.x.int()}, "torch.int32"),
    (quantized, {"x": lambda g: g.x[:, :64]}, "128"),
    (quantized, {"x": lambda g: g.x.to(META)}, "input is on meta, the weights are on cpu"),
    (normed, {"x": lambda g: g.x.half()}, "input is torch.float16"),
    (normed, {"scale": lambda g: g.scale[:1]}, r"scale: expected torch.bfloat16 of shape \(2, 128\) on cpu, got"),
    (normed, {"scale": lambda g: g.scale.float()}, r"got torch.float32 .* convert it with .to\(\)"),
    (normed, {"scale": lambda g: g.scale.to(META)}, "on meta; convert it"),
    (plain, {"q": lambda g: replace(g.q, scales=None)}, "must come from this backend's quantize"),
    (plain, {"q": lambda g: replace(g.q, lowrank=None)}, "must come from this backend's quantize"),
    (plain, {"q": lambda g: replace(g.q, codes=g.q.codes.int())}, "must come from this backend's quantize"),
    (plain, {"q": lambda g: replace(g.q, codes=g.q.codes[:, :32])}, "expected 128 channels .*, got 64 channels"),
    (plain, {"q": lambda g: replace(g.q, codes=g.q.codes[:5])}, r"expected 128 channels and lowrank \(5, 32\), got"),
    (plain, {"q": lambda g: replace(g.q, lowrank=g.q.lowrank[:, :16])}, r"lowrank \(6, 32\), got"),
    (
        plain,
        {"q": lambda g: replace(g.q, lowrank=g.q.lowrank.half())},
        "lowrank is torch.float16, expected torch.float32",
    ),
    (plain, {"q": lambda g: replace(g.q, scales=g.q.scales[:, :1])}, r"scales of shape \(6, 1\), expected \(6, 2\)"),
    (plain, {"q": lambda g: replace(g.q, scales=g.q.scales.contiguous())}, "its layout is another one"),
    (plain, {"q": lambda g: replace(g.q, codes=g.q.codes.to(META))}, "the input is on meta, the weights are on cpu"),
    (
        plain,
        {"q": lambda g: replace(g.q, dtype=torch.float16)},
        "input is torch.float16, the weights are torch.bfloat16",
    ),
    (gelu, {"following": lambda g: replace(g.following, smooth=g.following.smooth[:64])}, "must take 384 channels"),
    (
        gelu,
        {"following": lambda g: replace(g.following, proj_down=g.following.proj_down.to(META))},
        "must take 384 channels of torch.bfloat16 on cpu, it takes 384 of torch.bfloat16 on meta; convert it",
    ),
    (heads, {"norms": lambda g: (torch.ones(64), g.norms[1])}, r"norm_q: expected torch.float32 of shape \(128,\)"),
    (heads, {"norms": lambda g: (g.norms[0], torch.ones(128, device=META))}, "norm_k: .* on meta; convert"),
    (heads, {"rotary": lambda g: (g.rotary[0], g.rotary[1][:2])}, r"sin: expected torch.float32 of shape \(3, 128\)"),
    (heads, {"rotary": lambda g: tuple(t.to(META) for t in g.rotary)}, "cos: .* on meta"),
    (heads, {"rotary": lambda g: tuple(t[:0] for t in g.rotary)}, "no multiples of 0 tokens"),
    (
        heads,
        {"rotary": lambda g: tuple(torch.ones(4, 128) for _ in "cs")},
        "6 rows of 384 are no multiples of 4 tokens",
    ),
    (heads, {"rotary": lambda g: tuple(torch.ones(3, 96) for _ in "cs")}, "3 heads of 96"),
    (gated, {"residual": lambda g: g.residual[:1]}, r"6 rows do not fit a residual of shape \(1, 3, 384\)"),
    (gated, {"residual": lambda g: g.residual.flatten(0, 1)}, r"do not fit a residual of shape \(6, 384\)"),
    (gated, {"residual": lambda g: g.residual.half()}, "residual: expected torch.bfloat16"),
    (gated, {"gate": lambda g: g.gate[:, :64]}, r"gate: expected torch.bfloat16 of shape \(2, 384\)"),
    (gated, {"gate": lambda g: g.gate.to(META)}, "gate: .* on meta"),
    (modulated, {"x": lambda g: g.x.half()}, "expected torch.bfloat16 on cpu, got torch.float16 on cpu; convert"),
    (modulated, {"x": lambda g: g.x[:, :64]}, r"expected x of shape \(B, 128\)"),
    (modulated, {"x": lambda g: g.x.to(META)}, "got torch.bfloat16 on meta; convert"),
    (modulated, {"x": lambda g: g.x[0]}, r"got \(128,\)"),
]


@pytest.mark.parametrize("op", [quantized, normed, plain, gelu, heads, gated, modulated])
def test_right_inputs_are_launched(op: Callable[..., Any], launched: list[str], generator: torch.Generator) -> None:
    op(given(generator))
    assert launched


@pytest.mark.parametrize(("op", "change", "message"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_wrong_inputs_are_refused(
    op: Callable[..., Any],
    change: dict[str, Callable[..., Any]],
    message: str,
    launched: list[str],
    generator: torch.Generator,
) -> None:
    g = given(generator)
    for name, make in change.items():
        setattr(g, name, make(g))
    with pytest.raises(FormatError, match=message):
        op(g)
    assert not launched


@pytest.mark.parametrize("start", [1, 4])
def test_misaligned_weights_are_copied(start: int, launched: list[str], generator: torch.Generator) -> None:
    """Tensors inside of a larger file need not begin where 16-byte words do."""
    w = random_weights(64, 64, generator=generator)

    def moved(t: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(t.numel() + start, dtype=t.dtype)
        storage[start:] = t.flatten()
        return storage[start:].view(t.shape)

    packed = pack_product(SVDQWeights(**{name: moved(t) for name, t in w.tensors().items()}, unsigned=False))
    tensors = (packed.qweight, packed.wscales, packed.proj_up, packed.bias)
    assert all(t.data_ptr() % 16 == 0 for t in tensors)
    for found, name in zip(tensors, ("qweight", "wscales", "proj_up", "bias"), strict=True):
        assert torch.equal(found, w.tensors()[name])


def test_weights_that_disagree_are_refused(generator: torch.Generator) -> None:
    w = random_weights(64, 128, generator=generator)
    for name, tensor in (("wscales", w.wscales[:1]), ("proj_up", w.proj_up.half()), ("bias", w.bias[:5])):
        with pytest.raises(TonfaError, match=name):
            pack_product(replace(w, **{name: tensor}))
    modulation = random_modulation(64, 128, generator=generator).tensors()
    with pytest.raises(TonfaError, match="wzeros"):
        pack_w4a16(W4A16Weights(**{**modulation, "wzeros": modulation["wzeros"][:1]}))
