"""SVDQFluxTransformer2DModel: FLUX's transformer with 4-bit weights behind the interface of Diffusers' own.

Diffusers' modules compute what lies outside of the blocks (embedders, output layer); the blocks are those of
`blocks.py`. Any FLUX.1 variant that differs by configuration alone runs: dev, schnell, Depth, Canny, Fill,
Kontext, at any number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import (
    CombinedTimestepGuidanceTextProjEmbeddings,
    CombinedTimestepTextProjEmbeddings,
)
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from tonfa.checkpoint import native
from tonfa.checkpoint.strict import dtype_name
from tonfa.dispatch import usable_device
from tonfa.errors import CheckpointError, FormatError, UnsupportedError
from tonfa.formats import GROUP_SIZE
from tonfa.layers.linear import SVDQLinear
from tonfa.layers.modulation import SharedConditioning, W4A16Linear
from tonfa.models.flux.blocks import DoubleBlock, JointAttention, SingleAttention, SingleBlock
from tonfa.models.flux.checkpoints import open_checkpoint
from tonfa.models.flux.layers import layers_of
from tonfa.models.flux.plan import check_counts, flux_dims, flux_plan
from tonfa.models.flux.rotary import RotaryPositions
from tonfa.ops.activation import parse_activations
from tonfa.ops.choice import parse
from tonfa.ops.table import DEFAULT_ATTENTION, parse_attention
from tonfa.quantizer.planned import materialize
from tonfa.quantizer.recipe import Recipe
from tonfa.runtime.graphs import Graphs
from tonfa.weights import FLOAT_DTYPES

_RESERVED_LOADING_OPTIONS = {
    "device_map": (None,),
    "max_memory": (None,),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "variant": (None,),
    "use_safetensors": (None, True),
    "low_cpu_mem_usage": (None, True, False),
    "use_flashpack": (None, False),
    "disable_mmap": (None, False),
}
"""What Diffusers' pipelines pass to a component, with the values that ask for nothing this class lacks."""


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype itself, or the one of that name; None for what a checkpoint has."""
    if given is None or given == "auto":
        return None
    if isinstance(given, str):
        names = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}
        return names[parse("dtype", given, names)]
    return given


class SVDQFluxTransformer2DModel(FluxTransformer2DModel):
    """FLUX's transformer, 4-bit by SVDQuant; a Diffusers FLUX pipeline takes it as its `transformer`.

    Arguments are those of `diffusers.FluxTransformer2DModel`; `quantization_config` holds what the checkpoint says of
    its weights (rank, group size, recipe). None makes a model with 16-bit weights that runs through the same fused
    forward pass. A subclass for the sake of type checks alone: blocks, forward pass, loading and saving are its own.
    """

    # Diffusers writes a component's module into model_index.json and takes the last folder of a longer path for one of
    # its own pipelines ("flux" is one), so the class says its public place.
    __module__ = "tonfa"

    _supports_gradient_checkpointing = False
    _no_split_modules = ["DoubleBlock", "SingleBlock"]  # noqa: RUF012, Diffusers' own attribute
    _repeated_blocks = ["DoubleBlock", "SingleBlock"]  # noqa: RUF012, Diffusers' own attribute
    _cp_plan = None
    _tp_plan = None

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: Sequence[int] = (16, 56, 56),
        quantization_config: Mapping[str, Any] | None = None,
    ) -> None:
        super(FluxTransformer2DModel, self).__init__()  # not the dense blocks
        self.out_channels = out_channels or in_channels
        self.inner_dim = num_attention_heads * attention_head_dim
        if quantization_config is not None and self.inner_dim % GROUP_SIZE:
            raise FormatError(f"hidden size {self.inner_dim} is no multiple of the group size {GROUP_SIZE}")
        if not isinstance(guidance_embeds, bool):
            raise FormatError(f"guidance_embeds is {guidance_embeds!r}, expected true or false")
        _check_axes(axes_dims_rope, attention_head_dim)

        self.pos_embed = RotaryPositions(axes_dims_rope)
        embed = CombinedTimestepGuidanceTextProjEmbeddings if guidance_embeds else CombinedTimestepTextProjEmbeddings
        self.time_text_embed = embed(embedding_dim=self.inner_dim, pooled_projection_dim=pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, self.inner_dim)
        self.x_embedder = nn.Linear(in_channels, self.inner_dim)

        layers = layers_of(self.config)
        block = (self.inner_dim, attention_head_dim, layers)
        self.transformer_blocks = nn.ModuleList(
            DoubleBlock(f"transformer_blocks.{i}", *block) for i in range(num_layers)
        )
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(f"single_transformer_blocks.{i}", *block) for i in range(num_single_layers)
        )

        self.norm_out = AdaLayerNormContinuous(self.inner_dim, self.inner_dim, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(self.inner_dim, patch_size * patch_size * self.out_channels)
        self.requires_grad_(False)
        self._modulations = SharedConditioning()
        self._graphs = Graphs()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | int | None = None,
        activations: str | None = None,
        attention: str = DEFAULT_ATTENTION,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        **options: Any,
    ) -> SVDQFluxTransformer2DModel:
        """Load a 4-bit checkpoint, local or on the Hub: native, Nunchaku's folder or file, Diffusers' `nunchaku_lite`.

        A Hub id is `org/name`, or `org/name/file.safetensors` for a file of that repository. `device` is the CPU if not
        given.
        `dtype` (or `torch_dtype`) casts scales and 16-bit weights, `torch.float16` or "float16"; None and "auto" keep
        the checkpoint's. `activations` is the policy of `set_activations`, `attention` the choice of `set_attention`.
        Raises CheckpointError, naming file and tensor, for what is missing, truncated, misshapen or of another kind,
        UnsupportedError for values that are not known or a device that is not there, TypeError for unknown options.
        """
        for name, value in options.items():
            if name not in _RESERVED_LOADING_OPTIONS:
                raise TypeError(f"{cls.__name__}.from_pretrained has no option {name!r}")
            if value not in _RESERVED_LOADING_OPTIONS[name]:
                raise UnsupportedError(f"{cls.__name__}.from_pretrained does not support {name}={value!r}")
        parse_attention(attention)
        if activations is not None:
            parse_activations(activations)
        place = usable_device("cpu" if device is None else device)
        kind = _dtype(torch_dtype if dtype is None else dtype)
        opened = open_checkpoint(
            pretrained_model_name_or_path,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        model = cls._on_meta(opened.config, f"{opened.where}: config")
        spec = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
        source = opened.tensors(spec)
        tensors = native.read(source, spec, opened.where, device=place, dtype=kind)
        return model._filled(tensors).set_activations(activations).set_attention(attention)

    @classmethod
    def from_dense(
        cls,
        transformer: FluxTransformer2DModel,
        recipe: Recipe | None = Recipe(),  # noqa: B008, frozen
        *,
        activations: str | None = None,
    ) -> SVDQFluxTransformer2DModel:
        """Quantize a Diffusers transformer in memory, without calibration data; `recipe=None` keeps 16-bit weights.

        The result is on the transformer's device, in its dtype. `tonfa quantize` does the same from disk to disk, a
        block at a time.
        """
        config = dict(transformer.config)
        config["quantization_config"] = None if recipe is None else native.quantization_config(recipe.rank, recipe)
        model = cls._on_meta(config)
        tensors = materialize(flux_plan(flux_dims(config)), transformer.state_dict(), recipe)
        return model._filled(tensors).set_activations(activations)

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        is_main_process: bool = True,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "5GB",
        overwrite: bool = True,
        **options: Any,
    ) -> None:
        """Write the native checkpoint: config.json and safetensors, whole or not at all."""
        if options.pop("push_to_hub", False):
            raise UnsupportedError("save_pretrained does not push; use huggingface_hub.upload_folder on the folder")
        if options:
            raise TypeError(f"save_pretrained has no option {', '.join(map(repr, options))}")
        if not safe_serialization or variant is not None:
            raise UnsupportedError("native checkpoints are safetensors without variants")
        if self.config.quantization_config is None:
            raise UnsupportedError("this model has 16-bit weights: save the Diffusers transformer that it was made of")
        if is_main_process:
            native.save(
                Path(save_directory),
                dict(self.config),
                self.state_dict(),
                max_shard_size=max_shard_size,
                overwrite=overwrite,
            )

    @classmethod
    def _on_meta(cls, config: Mapping[str, Any], where: str = "config.json") -> SVDQFluxTransformer2DModel:
        """A model of this configuration without memory for its tensors. `where` names it in errors."""
        arguments = {name: value for name, value in config.items() if not name.startswith("_")}
        check_counts(arguments, where)
        try:
            with torch.device("meta"):
                return cls(**arguments)
        except (TypeError, KeyError, ValueError, ZeroDivisionError, RuntimeError) as error:
            raise CheckpointError(f"{where} describes no FLUX transformer: {error}") from error

    def _filled(self, tensors: Mapping[str, Tensor]) -> SVDQFluxTransformer2DModel:
        self.load_state_dict(tensors, strict=True, assign=True)
        return self.requires_grad_(False).eval()

    def set_activations(self, activations: str | None, backend: str | None = None) -> SVDQFluxTransformer2DModel:
        """Choose how activations are quantized ("int4", "int8", "fp8", "none") and, if wanted, the backend.

        None takes the default of the device that the model is on. Returns the model.
        """
        for layer in self.modules():
            if isinstance(layer, SVDQLinear):
                layer.set_activations(activations, backend)
            elif isinstance(layer, W4A16Linear):
                layer.set_backend(activations, backend)
        return self

    def set_weights(self, weights: str) -> SVDQFluxTransformer2DModel:
        """Keep weights in 4 bits alone ("int4", the default), or expanded beside them ("fp8"). Returns the model.

        "fp8" takes 8 GiB more for FLUX.1 and saves the pass that expands a layer's weights before each product, on
        Hopper GPUs with activations="fp8". The outputs are equal. Raises UnsupportedError for another name here, and in
        the first step where the device has no such form.
        """
        for layer in self.modules():
            if isinstance(layer, SVDQLinear):
                layer.set_weights(weights)
        self._graphs.clear()
        return self

    def set_attention(self, attention: str) -> SVDQFluxTransformer2DModel:
        """Choose how attention is computed: "sdpa" in 16 bits, "fp8" on GPUs from Hopper on, "auto" one of them.

        "auto" is "fp8" on Hopper GPUs where nvidia-cudnn-frontend is installed. Returns the model.

        FP8 attention rounds q, k, v, the probabilities and the result to three bits of mantissa; it is left out with a
        logged reason where a mask is given. Raises UnsupportedError for an unknown name here, and in the first step
        where the device cannot compute it; `tonfa doctor` says why.
        """
        for module in self.modules():
            if isinstance(module, JointAttention | SingleAttention):
                module.attention.choose(attention)
        self._graphs.clear()
        return self

    def set_cuda_graphs(self, enabled: bool) -> SVDQFluxTransformer2DModel:
        """Whether repeated steps of one shape run as CUDA graphs (the default on a GPU). Returns the model.

        A graph keeps the memory of one step's intermediate results for each of the last few shapes.
        """
        self._graphs.enabled = enabled
        self._graphs.clear()
        return self

    def set_attention_backend(self, backend: str, *_: Any, **__: Any) -> None:
        """Not offered: Diffusers' backends are not used."""
        raise UnsupportedError(f"attention backend {backend!r}: the attention is chosen by set_attention")

    def load_lora_adapter(self, *_: Any, **__: Any) -> None:
        """Not offered yet."""
        raise UnsupportedError("LoRA adapters cannot be loaded into a 4-bit model; merge them before quantizing")

    def add_adapter(self, *_: Any, **__: Any) -> None:
        """Not offered: the weights are not trained."""
        raise UnsupportedError("a 4-bit model takes no adapters; train them on the 16-bit model")

    def _load_ip_adapter_weights(self, *_: Any, **__: Any) -> None:
        raise UnsupportedError("IP-Adapters cannot be loaded into a 4-bit model")

    @classmethod
    def from_single_file(cls, *_: Any, **__: Any) -> None:
        """Not offered: single files of other tools hold 16-bit weights."""
        raise UnsupportedError("from_single_file reads no 4-bit checkpoint; use from_pretrained")

    def forward(
        self,
        hidden_states: Tensor,  # (B, L_img, in_channels)
        encoder_hidden_states: Tensor | None = None,  # (B, L_txt, joint_attention_dim)
        pooled_projections: Tensor | None = None,  # (B, pooled_projection_dim)
        timestep: Tensor | None = None,  # (B,) in [0, 1]
        img_ids: Tensor | None = None,  # (L_img, 3)
        txt_ids: Tensor | None = None,  # (L_txt, 3)
        guidance: Tensor | None = None,  # (B,)
        joint_attention_kwargs: Mapping[str, Any] | None = None,
        controlnet_block_samples: Sequence[Tensor] | None = None,  # each (B, L_img, hidden)
        controlnet_single_block_samples: Sequence[Tensor] | None = None,  # each (B, L_img, hidden)
        return_dict: bool = True,
        controlnet_blocks_repeat: bool = False,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity (B, L_img, out_channels), as `diffusers.FluxTransformer2DModel.forward` computes it.

        `joint_attention_kwargs` may hold `attention_mask` ((B, L), True or 1 attends, or broadcastable to
        (B, H, L, L), where True attends and numbers are added to the scores, L = L_txt + L_img) and `scale`, which only
        scales LoRA layers and has no effect here. Raises FormatError, naming the input, for shapes that do not fit, and
        for no tokens.
        """
        inputs = _checked(
            self.config,
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            img_ids=img_ids,
            txt_ids=txt_ids,
            guidance=guidance,
        )
        mask = _attention_mask(self.config, joint_attention_kwargs, inputs)
        if mask is not None:
            inputs["mask"] = mask
        for name, samples in (
            ("controlnet_block_samples", controlnet_block_samples),
            ("controlnet_single_block_samples", controlnet_single_block_samples),
        ):
            if samples is not None and not len(samples):
                raise FormatError(f"{name} is empty; give None where a ControlNet has none")
        if controlnet_block_samples is None and controlnet_single_block_samples is None:
            sample = self._graphs.run(self, self._velocity, inputs)
        else:
            sample = self._velocity(
                inputs, controlnet_block_samples, controlnet_single_block_samples, controlnet_blocks_repeat
            )
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _embed(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the blocks read of checked inputs: img (B, L_img, hidden), txt (B, L_txt, hidden), vec (B, hidden)."""
        img = self.x_embedder(inputs["hidden_states"])
        txt = self.context_embedder(inputs["encoder_hidden_states"])
        conditions = [inputs[name].to(img.dtype) * 1000 for name in ("timestep", "guidance") if name in inputs]
        return img, txt, self.time_text_embed(*conditions, inputs["pooled_projections"])

    def _velocity(
        self,
        inputs: Mapping[str, Tensor],
        double_samples: Sequence[Tensor] | None = None,
        single_samples: Sequence[Tensor] | None = None,
        repeat: bool = False,
    ) -> Tensor:
        """The forward pass on checked inputs, with ControlNet's samples added after the blocks."""
        mask = inputs.get("mask")
        img, txt, vec = self._embed(inputs)
        # The same tensors for all blocks: kernels may keep what they made of them.
        text_length = txt.shape[1]
        cos, sin = rotary = self.pos_embed(torch.cat((inputs["txt_ids"], inputs["img_ids"])))
        txt_rotary, img_rotary = (cos[:text_length], sin[:text_length]), (cos[text_length:], sin[text_length:])

        blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
        modulations = [block.modulations() for block in blocks]
        joined = iter(self._modulations([m for each in modulations for m in each], vec))
        modulated = [tuple(islice(joined, len(each))) for each in modulations]

        for i, block in enumerate(self.transformer_blocks):
            img, txt = block(img, txt, vec, img_rotary, txt_rotary, mask, modulated[i])
            if double_samples is not None:
                count = len(double_samples)
                stride = math.ceil(len(self.transformer_blocks) / count)
                img = img + double_samples[i % count if repeat else i // stride]

        x = torch.cat((txt, img), dim=1)
        for i, block in enumerate(self.single_transformer_blocks):
            x = block(x, vec, rotary, mask, modulated[len(self.transformer_blocks) + i])
            if single_samples is not None:
                stride = math.ceil(len(self.single_transformer_blocks) / len(single_samples))
                x[:, text_length:] += single_samples[i // stride]

        velocity: Tensor = self.proj_out(self.norm_out(x[:, text_length:], vec))
        return velocity


def _check_axes(axes: object, head_dim: int) -> None:
    """No tensor depends on the axes of the rotary positions, so that the files cannot tell whether they are right."""
    sizes = axes if isinstance(axes, Sequence) and not isinstance(axes, str) else ()
    if any(type(size) is not int or size < 2 or size % 2 for size in sizes) or sum(sizes) != head_dim:
        raise FormatError(f"axes_dims_rope is {axes!r}, expected even sizes whose sum is the head's, {head_dim}")


def _checked(config: Any, **inputs: Tensor | None) -> dict[str, Tensor]:
    """The inputs that are given, checked against the configuration and each other; ids lose their batch dimension."""
    optional = set() if config.guidance_embeds else {"guidance"}
    missing = sorted(name for name, value in inputs.items() if value is None and name not in optional)
    if missing:
        raise FormatError(f"the transformer needs {', '.join(missing)}")
    if not config.guidance_embeds and inputs["guidance"] is not None:
        raise FormatError("guidance was given, but this model has no guidance embedding (guidance_embeds is false)")
    given = {name: value for name, value in inputs.items() if value is not None}
    for name in ("img_ids", "txt_ids"):
        if given[name].ndim == 3:
            given[name] = given[name][0]
    for name in ("hidden_states", "encoder_hidden_states"):
        shape = tuple(given[name].shape)
        if len(shape) != 3 or not shape[1]:
            raise FormatError(f"{name}: expected (batch, tokens, channels) with one token at least, got {shape}")
    batch, img_length = given["hidden_states"].shape[:2]
    txt_length = given["encoder_hidden_states"].shape[1]
    expected = {
        "hidden_states": (batch, img_length, config.in_channels),
        "encoder_hidden_states": (batch, txt_length, config.joint_attention_dim),
        "pooled_projections": (batch, config.pooled_projection_dim),
        "timestep": (batch,),
        "guidance": (batch,),
        "img_ids": (img_length, len(config.axes_dims_rope)),
        "txt_ids": (txt_length, len(config.axes_dims_rope)),
    }
    for name, tensor in given.items():
        shape = tuple(tensor.shape)
        if name in ("timestep", "guidance") and shape in ((), (1,)):
            given[name] = tensor.reshape(1).expand(batch)
        elif shape != expected[name]:
            raise FormatError(f"{name}: expected shape {expected[name]}, got {shape}")
    return given


def _attention_mask(
    config: Any, joint_attention_kwargs: Mapping[str, Any] | None, inputs: Mapping[str, Tensor]
) -> Tensor | None:
    """The mask that is given, checked against the other inputs: broadcastable to (B, H, L, L)."""
    unknown = set(joint_attention_kwargs or {}) - {"attention_mask", "scale"}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UnsupportedError(f"joint_attention_kwargs: {names} not supported; known are attention_mask and scale")
    mask: Tensor | None = (joint_attention_kwargs or {}).get("attention_mask")
    if mask is None:
        return None
    img = inputs["hidden_states"]
    length = inputs["encoder_hidden_states"].shape[1] + img.shape[1]
    scores = (img.shape[0], config.num_attention_heads, length, length)
    found, place = tuple(mask.shape), mask.device
    if mask.ndim == 2:
        mask = mask.bool()[:, None, None, :]
    sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.ndim > 4 or any(size not in (1, whole) for size, whole in sizes):
        expected = f"{(img.shape[0], length)} or what broadcasts to {scores}"
        raise FormatError(f"attention_mask: expected shape {expected}, got {found}")
    if mask.dtype not in (torch.bool, torch.float32, img.dtype) or place != img.device:
        expected = f"torch.bool, torch.float32 or {img.dtype} on {img.device}"
        raise FormatError(f"attention_mask: expected {expected}, got {mask.dtype} on {place}; convert it with .to()")
    return mask
