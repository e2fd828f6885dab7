"""`nunchaku_lite` folders made module by module, Diffusers' own loader for them, and its kernels in plain PyTorch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from tonfa.checkpoint import nunchaku_layout as layout
from tonfa.formats import INT4, UINT4
from tonfa.ops import product, quantize, w4a16
from tonfa.ops.activation import InputWeights, QuantizedActivation
from tonfa.quantizer.modulation import quantize_modulation
from tonfa.quantizer.recipe import Recipe, quantize_linear
from tonfa.weights import SVDQWeights, W4A16Weights

WEIGHTS = "diffusion_pytorch_model.safetensors"
DOUBLE = ("attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
SINGLE = ("proj_mlp", "proj_out")
TRIPLE, ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")

Modules = dict[str, SVDQWeights | W4A16Weights]


def targets(dense: FluxTransformer2DModel) -> tuple[list[tuple[str, ...]], list[str]]:
    """The 4-bit linears, those of one input together, and the modulations."""
    groups: list[tuple[str, ...]] = []
    modulations = []
    for i in range(dense.config.num_layers):
        p = f"transformer_blocks.{i}."
        groups += [tuple(p + name for name in names) for names in (TRIPLE, ADDED, *((name,) for name in DOUBLE))]
        modulations += [f"{p}norm1.linear", f"{p}norm1_context.linear"]
    for i in range(dense.config.num_single_layers):
        p = f"single_transformer_blocks.{i}."
        groups += [tuple(p + name for name in names) for names in (TRIPLE, *((name,) for name in SINGLE))]
        modulations.append(f"{p}norm.linear")
    return groups, modulations


def quantized_modules(dense: FluxTransformer2DModel, share: str, rank: int = 16) -> Modules:
    """Every target of a dense model in 4 bits, with random smoothing factors.

    `share` says what q, k and v have in common: "branch" (and smoothing), "smoothing" or "nothing".
    """
    generator = torch.Generator().manual_seed(3)
    groups, modulations = targets(dense)

    def smoothed(weight: Tensor, bias: Tensor, smooth: Tensor) -> SVDQWeights:
        made = quantize_linear(weight.float() * smooth.float(), bias.float(), Recipe(rank=rank, iterations=0))
        down = made.proj_down / smooth.float()[:, None]
        floats = replace(made, smooth_factor=smooth, proj_down=down).tensors()
        return SVDQWeights(**{n: t.bfloat16() if t.is_floating_point() else t for n, t in floats.items()})

    modules: Modules = {}
    for group in groups:
        linears = [dense.get_submodule(name) for name in group]
        width = linears[0].in_features
        smooths = [(torch.rand(width, generator=generator) + 0.5).bfloat16() for _ in group]
        if share != "nothing":
            smooths = smooths[:1] * len(group)
        if share == "branch":
            whole = smoothed(
                torch.cat([x.weight for x in linears]).detach(),
                torch.cat([x.bias for x in linears]).detach(),
                smooths[0],
            )
            for i, name in enumerate(group):
                modules[name] = rows_of(whole, i, len(group))
        else:
            for name, linear, smooth in zip(group, linears, smooths, strict=True):
                modules[name] = smoothed(linear.weight.detach(), linear.bias.detach(), smooth)
        if name.endswith("proj_out"):
            modules[name].bias[3] = -0.0  # another sign of zero is another bit
    for name in modulations:
        linear = dense.get_submodule(name)
        modules[name] = quantize_modulation(linear.weight.detach(), linear.bias.detach(), dtype=torch.bfloat16)
    return modules


def rows_of(w: SVDQWeights, index: int, count: int) -> SVDQWeights:
    """One of `count` equal shares of the output channels."""
    return replace(
        w,
        qweight=w.qweight.chunk(count)[index],
        wscales=w.wscales.chunk(count, dim=1)[index],
        proj_up=w.proj_up.chunk(count)[index],
        bias=w.bias.chunk(count)[index],
    )


def packed(w: SVDQWeights | W4A16Weights) -> dict[str, Tensor]:
    """A module's tensors as Diffusers' module holds them."""
    if isinstance(w, W4A16Weights):
        return {**w.tensors(), "qweight": layout.pack_w4a16_codes(UINT4.unpack(w.qweight))}
    return {
        "qweight": layout.pack_codes(w.codes()),
        "wscales": layout.pack_scales(w.wscales),
        "bias": layout.pack_vector(w.bias),
        "smooth_factor": layout.pack_vector(w.smooth_factor),
        "proj_down": layout.pack_lowrank(w.proj_down, down=True),
        "proj_up": layout.pack_lowrank(w.proj_up, down=False),
    }


def save_lite(folder: Path, dense: FluxTransformer2DModel, modules: Modules) -> Path:
    """The folder with these modules, and the rest of the dense model in bfloat16."""
    folder.mkdir(parents=True)
    tensors = {f"{name}.{field}": t for name, w in modules.items() for field, t in packed(w).items()}
    for name, tensor in dense.state_dict().items():
        if name.rpartition(".")[0] not in modules:
            tensors[name] = tensor.bfloat16()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    kinds = {name: "svdq_w4a4" if isinstance(w, SVDQWeights) else "awq_w4a16" for name, w in modules.items()}
    rank = next(w.rank for w in modules.values() if isinstance(w, SVDQWeights))
    sections = {
        kind: {"precision": "int4", "group_size": 64, "targets": [n for n, k in kinds.items() if k == kind]}
        for kind in ("svdq_w4a4", "awq_w4a16")
    }
    sections["svdq_w4a4"]["rank"] = rank
    quantization = {"quant_method": "nunchaku_lite", "compute_dtype": "bfloat16", **sections}
    config = {**dense.config, "_class_name": "FluxTransformer2DModel", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dense_twin(dense: FluxTransformer2DModel, modules: Modules) -> FluxTransformer2DModel:
    """Diffusers' model with the weights that the modules stand for, in float32."""
    twin = FluxTransformer2DModel.from_config(dense.config).float().eval()
    state = {name: tensor.bfloat16().float() for name, tensor in dense.state_dict().items()}
    for name, w in modules.items():
        state[f"{name}.weight"], state[f"{name}.bias"] = w.dense()
    twin.load_state_dict(state)
    return twin


class PlainKernels:
    """What Diffusers' modules call on a GPU, from the references of the ops."""

    def __init__(self) -> None:
        self._inputs: dict[int, QuantizedActivation] = {}

    def quantize_w4a4_act_fuse_lora(
        self, x: Tensor, codes: Tensor, scales: Tensor, down: Tensor, lora_act: Tensor, smooth: Tensor, *flags: bool
    ) -> None:
        k = x.shape[1]
        weights = InputWeights(
            layout.unpack_vector(smooth, k), layout.unpack_lowrank(down, k, down=True), False, "int4"
        )
        assert flags == (False, False)
        self._inputs[codes.data_ptr()] = quantize.reference(x, weights)

    def gemm_w4a4(self, codes: Tensor, qweight: Tensor, out: Tensor, *arguments: Any) -> None:
        x = self._inputs.pop(codes.data_ptr())
        wscales, up, bias, unsigned = (arguments[i] for i in (2, 6, 12, 16))
        (n, k), unpack = (qweight.shape[0], qweight.shape[1] * 2), layout.unpack_vector
        assert unsigned is False
        weights = SVDQWeights(
            INT4.pack(layout.unpack_codes(qweight, n, k)),
            layout.unpack_scales(wscales, k // 64, n),
            torch.ones(k),
            torch.zeros(k, up.shape[1]),
            layout.unpack_lowrank(up, n, down=False),
            unpack(bias, n),
        )
        out.copy_(product.reference(x, weights, "int4"))

    def gemv_awq(
        self, x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor, m: int, n: int, k: int, g: int
    ) -> Tensor:
        assert (m, g) == (len(x), 64)
        codes = UINT4.pack(layout.unpack_w4a16_codes(qweight, n, k))
        return w4a16.reference(x, W4A16Weights(codes, wscales, wzeros, torch.zeros(n)))


@contextmanager
def diffusers_loader(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Diffusers' `nunchaku_lite` modules, with plain kernels in place of those that it would fetch from the Hub."""
    import diffusers.utils
    import diffusers.utils.constants
    from diffusers.quantizers.nunchaku import NunchakuLiteQuantizer

    name = "diffusers.quantizers.nunchaku.utils"
    fake = ModuleType("kernels")
    get_kernel: Callable[..., Any] = lambda *_, **__: SimpleNamespace(ops=PlainKernels())  # noqa: E731
    fake.get_kernel = get_kernel  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "kernels", fake)
        patch.setattr(diffusers.utils, "is_kernels_available", lambda: True)
        patch.setattr(diffusers.utils, "is_kernels_version", lambda *_: False)
        patch.setattr(diffusers.utils.constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
        patch.setattr(NunchakuLiteQuantizer, "validate_environment", lambda *_, **__: None)
        patch.delitem(sys.modules, name, raising=False)
        try:
            yield import_module(name)
        finally:
            sys.modules.pop(name, None)
