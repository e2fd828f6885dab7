"""Models of a few megabytes at most with random weights, saved as Diffusers and Transformers save them."""

from __future__ import annotations

import string
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler


def tiny_vae() -> AutoencoderKL:
    """Eight times smaller latents of 16 channels, as FLUX's, with random weights."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX's: dynamic shifting."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def save_tiny_pipeline(folder: Path, *, control: bool = True, guidance: bool = True) -> Path:
    """FLUX.1-Depth's parts, or FLUX.1-dev's: 1 + 1 blocks of 128 channels, tokenizers of single characters."""
    from diffusers import FluxControlPipeline, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(0)
    letters = string.ascii_lowercase + string.digits
    clip_words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    clip_tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(clip_words)}, merges=[], model_max_length=77)
    t5_pieces = ["<pad>", "</s>", "<unk>", "▁", *letters, *(f"<extra_id_{i}>" for i in range(99, -1, -1))]
    t5_tokenizer = T5TokenizerFast(vocab=[(piece, -1.0) for piece in t5_pieces], model_max_length=512)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=32,
            intermediate_size=32,
            projection_dim=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            eos_token_id=clip_tokenizer.eos_token_id,
        )
    )
    text_encoder_2 = T5EncoderModel(
        T5Config(vocab_size=len(t5_tokenizer), d_model=32, d_kv=32, d_ff=32, num_layers=1, num_heads=1)
    )
    transformer = FluxTransformer2DModel(
        in_channels=128 if control else 64,
        out_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56),
    )
    pipeline = (FluxControlPipeline if control else FluxPipeline)(
        scheduler=flux_scheduler(),
        vae=tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=clip_tokenizer,
        text_encoder_2=text_encoder_2,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Diffusers itself
        pipeline.to(torch.bfloat16).save_pretrained(folder)
    return folder


def save_tiny_depth_model(folder: Path) -> Path:
    """A Depth-Anything of 16 channels with random weights, and its image processor."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
    from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil

    torch.manual_seed(0)
    backbone = Dinov2Config(
        image_size=28,
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=4,
        out_indices=[1, 2, 3, 4],
        out_features=None,
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    size = {"height": 56, "width": 56}
    DPTImageProcessorPil(size=size, keep_aspect_ratio=True, ensure_multiple_of=14).save_pretrained(folder)
    return folder


def save_random_lpips(folder: Path) -> tuple[Path, Path]:
    """Files of AlexNet and of LPIPS's heads with random weights, under their published names."""
    from safetensors.torch import save_file

    from tonfa.evaluate.lpips import LAYERS

    generator = torch.Generator().manual_seed(0)
    backbone, heads = {"classifier.6.bias": torch.zeros(1000)}, {}
    for i, (index, out, into, kernel, _, _) in enumerate(LAYERS):
        weight = torch.randn(out, into, kernel, kernel, generator=generator)
        backbone[f"features.{index}.weight"] = weight * (2 / (into * kernel**2)) ** 0.5
        backbone[f"features.{index}.bias"] = 0.1 * torch.randn(out, generator=generator)
        heads[f"lin{i}.model.1.weight"] = torch.rand(1, out, 1, 1, generator=generator)
    save_file(backbone, folder / "alexnet.safetensors")
    save_file(heads, folder / "heads.safetensors")
    return folder / "alexnet.safetensors", folder / "heads.safetensors"
