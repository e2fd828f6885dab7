"""FLUX a block at a time over stored samples: what a calibration collects inputs from.

The host keeps one hidden state a sample, (L_txt + L_img) x hidden in the model's dtype: 28 MB for FLUX at 1024 x 1024
in bf16. The device keeps one block and one sample's activations; how many samples there are costs it only their
conditioning vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tonfa.layers.dense import DenseLinear
from tonfa.layers.fused import FusedLinear
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import Modulation
from tonfa.layers.observed import ObservedLinear
from tonfa.models.flux.blocks import DoubleBlock, Layers, SingleBlock
from tonfa.models.flux.layers import DenseLayers, QuantizedLayers
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.ops.fused import Rotary
from tonfa.plan import BlockPlan, ModelPlan
from tonfa.quantizer.calibration import Observe
from tonfa.quantizer.memory import enough_memory
from tonfa.quantizer.samples import Samples

Report = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


class _ObservedLayers:
    """16-bit weights whose inputs are shown under the linear's name."""

    def __init__(self, observe: Observe) -> None:
        self._observe = observe

    def linear(self, name: str, in_features: int, out_features: int) -> FusedLinear:
        """A dense linear."""
        return ObservedLinear(in_features, out_features, lambda x: self._observe(name, x))

    def modulation(self, name: str, hidden_size: int, chunks: int) -> Modulation:
        """A dense modulation, which is not observed: its weights alone are quantized, with 16-bit activations."""
        return Modulation(hidden_size, chunks, DenseLinear(hidden_size, chunks * hidden_size))


@dataclass(frozen=True)
class _Positions:
    """Rotary tables on the device, shared by all samples of one size."""

    txt: Rotary
    img: Rotary
    both: Rotary


@dataclass(frozen=True)
class _State:
    """One sample between two blocks."""

    x: Tensor  # (1, L_txt + L_img, hidden) on the host, text first, written in place
    vec: Tensor  # (1, hidden) on the device
    positions: _Positions


class FluxWalk:
    """`quantizer.calibration.Walk` of a FLUX transformer."""

    def __init__(
        self,
        config: Mapping[str, Any],
        plan: ModelPlan,
        samples: Samples,
        *,
        rank: int,
        activations: str,
        device: torch.device,
        dtype: torch.dtype,
        report: Report | None = None,
    ) -> None:
        """`rank` and `activations` are those of quantized blocks."""
        self._config, self._plan, self._samples = dict(config), plan, samples
        self._rank, self._activations = rank, activations
        self._device, self._dtype, self._report = device, dtype, report
        self._states: list[_State] = []

    @torch.no_grad()
    def run(
        self, block: BlockPlan, tensors: Mapping[str, Tensor], *, quantized: bool, observe: Observe | None, keep: bool
    ) -> None:
        """Run the next block on every sample; the first, which has no linears of the plan, embeds their inputs."""
        with enough_memory(f"running {block.name} on the calibration's samples", "lower --size or --samples"):
            if not block.linears:
                if keep:
                    self._embed(tensors)
                return
            module = self._module(block, tensors, quantized, observe)
            for i, state in enumerate(self._states):
                self._step(module, state, keep)
                if self._report is not None:
                    what = "inputs of" if observe is not None else "passing"
                    self._report(f"{what} {block.name}", i + 1, len(self._states))

    def _embed(self, tensors: Mapping[str, Tensor]) -> None:
        """The states in front of the first repeated block."""
        layers = {"num_layers": 0, "num_single_layers": 0, "quantization_config": None}
        model = SVDQFluxTransformer2DModel._on_meta({**self._config, **layers})
        model = model._filled({name: tensor.to(self._device) for name, tensor in tensors.items()})
        positions: dict[bytes, _Positions] = {}
        self._states = []
        for i in range(self._samples.count):
            stored = self._samples.read(i)
            img, txt, vec = model._embed({name: self._floats(tensor) for name, tensor in stored.items()})
            ids = torch.cat([stored["txt_ids"], stored["img_ids"]]).float()
            key = ids.numpy().tobytes()
            if key not in positions:
                length = txt.shape[1]
                cos, sin = both = model.pos_embed(ids.to(self._device))
                positions[key] = _Positions((cos[:length], sin[:length]), (cos[length:], sin[length:]), both)
            x = torch.cat([txt, img], dim=1).cpu()
            # Page-locked memory is copied from and to the GPU without a wait.
            self._states.append(_State(x.pin_memory() if self._device.type == "cuda" else x, vec, positions[key]))

    def _floats(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, self._dtype if tensor.is_floating_point() else None)

    def _module(
        self, block: BlockPlan, tensors: Mapping[str, Tensor], quantized: bool, observe: Observe | None
    ) -> nn.Module:
        """The block on the device."""
        layers: Layers = DenseLayers()
        if quantized:
            layers = QuantizedLayers(self._plan, self._rank)
        elif observe is not None:
            layers = _ObservedLayers(observe)
        head_dim = int(self._config["attention_head_dim"])
        hidden = head_dim * int(self._config["num_attention_heads"])
        kind = DoubleBlock if block.name.startswith("transformer_blocks.") else SingleBlock
        with torch.device("meta"):
            module: nn.Module = kind(block.name, hidden, head_dim, layers)
        prefix = f"{block.name}."
        state = {name.removeprefix(prefix): tensor.to(self._device) for name, tensor in tensors.items()}
        module.load_state_dict(state, strict=True, assign=True)
        for layer in module.modules():
            if isinstance(layer, SVDQLinear):
                layer.set_activations(self._activations)
        return module.requires_grad_(False).eval()

    def _step(self, module: nn.Module, state: _State, keep: bool) -> None:
        x = state.x.to(self._device, non_blocking=True)
        length = state.positions.txt[0].shape[0]
        if isinstance(module, SingleBlock):
            x = module(x, state.vec, state.positions.both)
            if keep:
                state.x.copy_(x, non_blocking=True)
            return
        img, txt = module(x[:, length:], x[:, :length], state.vec, state.positions.img, state.positions.txt)
        if keep:
            state.x[:, length:].copy_(img, non_blocking=True)
            state.x[:, :length].copy_(txt, non_blocking=True)
