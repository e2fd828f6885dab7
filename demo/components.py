"""The parts of the demo pipeline, built from configurations alone: tokenizers, text encoders, VAE, transformer.

Every class is the one that FLUX.1-Depth uses; only the sizes differ. `Size` fixes them: DEMO is what is shipped (39 MB
in bf16), TINY is for tests.
"""

from __future__ import annotations

import string
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from captions import captions, full_captions
from scenes import TRAIN_SEED, sample_scenes

CLIP_LENGTH = 77
T5_LENGTH = 512

# The tokens that each T5 head starts out looking at, as first and last distance (negative is before).
T5_WINDOWS = ((1, 1), (1, 2), (1, 4), (-1, -1), (-2, -1), (-4, -1), (-T5_LENGTH, 0), (-16, 16))
T5_OUTSIDE = -8.0  # what a head's logits are lowered by outside its window; 512 tokens of padding then weigh 0.17


@dataclass(frozen=True)
class Size:
    heads: int  # of 128 channels each
    double_blocks: int
    single_blocks: int
    vae_channels: tuple[int, int, int, int]
    vae_groups: int
    clip_width: int
    t5_width: int


DEMO = Size(2, 3, 8, (48, 64, 96, 96), 16, 128, 256)
TINY = Size(1, 1, 1, (8, 8, 8, 8), 4, 64, 64)
SIZES = {"demo": DEMO, "tiny": TINY}


def build_tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Vocabularies of the captions' words, one token each, with single characters for everything else."""
    scenes = sample_scenes(TRAIN_SEED, 2048)
    texts = captions(scenes, 0) + captions(scenes, 1) + full_captions(scenes)
    words = sorted({word.strip(",.:") for text in texts for word in text.split()})
    return _clip_tokenizer(sorted({w.lower() for w in words})), _t5_tokenizer(words)


def _clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    # The byte alphabet of byte-level BPE: printable bytes stand for themselves, the others for code points from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    merges = _learn_merges(words)
    pieces = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, until every word is one piece."""
    split = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while True:
        counts = Counter(pair for word in split for pair in pairwise(word))
        if not counts:
            return merges
        first, second = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append((first, second))
        for word in split:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [first, second]:
                    word[i : i + 2] = [first + second]


def _t5_tokenizer(words: list[str]) -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [("▁" + word, -3.0) for word in words]
    pieces += [(c, -3.0 if c in ",.:" else -8.0) for c in string.printable if not c.isspace()]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return T5TokenizerFast(vocab=pieces, model_max_length=T5_LENGTH)


def build_text_encoders(
    size: Size, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5TokenizerFast
) -> tuple[CLIPTextModel, T5EncoderModel]:
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=size.clip_width,
        intermediate_size=2 * size.clip_width,
        projection_dim=size.clip_width,
        num_hidden_layers=2,
        num_attention_heads=size.clip_width // 64,
        max_position_embeddings=CLIP_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=size.t5_width,
        d_kv=size.t5_width // len(T5_WINDOWS),
        num_heads=len(T5_WINDOWS),
        d_ff=size.t5_width,
        num_layers=2,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    encoder = T5EncoderModel(t5)
    _look_at_neighbors(encoder)
    return CLIPTextModel(clip), encoder


@torch.no_grad()
def _look_at_neighbors(t5: T5EncoderModel) -> None:
    """Sets the relative position bias, the only thing that tells T5 the order of the words.

    The transformer has it from T5 alone, but for CLIP's one pooled vector. From the usual start near zero the bias
    hardly moves in a short training: the text stays a bag of words, and which color belongs to which object is lost.
    """
    attention = t5.encoder.block[0].layer[0].SelfAttention
    distances = torch.arange(1 - T5_LENGTH, T5_LENGTH)
    buckets = attention._relative_position_bucket(
        distances,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    for head, (first, last) in enumerate(T5_WINDOWS):
        attention.relative_attention_bias.weight[:, head] = T5_OUTSIDE
        inside = buckets[(distances >= first) & (distances <= last)]
        attention.relative_attention_bias.weight[inside, head] = 0.0


def build_vae(size: Size, resolution: int) -> AutoencoderKL:
    """Starts with a narrow posterior (deviation 0.08): a wide one takes long to shrink and blurs what is sampled."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=size.vae_channels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=size.vae_groups,
        sample_size=resolution,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    logvar = slice(16, 32)
    nn.init.zeros_(vae.encoder.conv_out.weight.data[logvar])
    nn.init.constant_(vae.encoder.conv_out.bias.data[logvar], -5.0)
    return vae


def build_transformer(size: Size) -> FluxTransformer2DModel:
    """Starts as a map to zero whose blocks are identities: output and modulation weights are zero."""
    model = FluxTransformer2DModel(
        in_channels=128,
        out_channels=64,
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=128,
        num_attention_heads=size.heads,
        joint_attention_dim=size.t5_width,
        pooled_projection_dim=size.clip_width,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )
    zero = [model.proj_out, model.norm_out.linear]
    zero += [
        linear for block in model.transformer_blocks for linear in (block.norm1.linear, block.norm1_context.linear)
    ]
    zero += [block.norm.linear for block in model.single_transformer_blocks]
    for linear in zero:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


class TextToVelocity(nn.Module):
    """Text encoders and transformer as one module: token ids and noisy latents in, velocity out."""

    def __init__(self, transformer: FluxTransformer2DModel, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.transformer = transformer
        self.clip = clip
        self.t5 = t5

    def forward(
        self,
        noisy: torch.Tensor,  # (B, L, 64) packed latents
        control: torch.Tensor,  # (B, L, 64) packed latents of the control image
        sigma: torch.Tensor,  # (B,) in 0..1
        guidance: torch.Tensor,  # (B,)
        clip_ids: torch.Tensor,  # (B, 77)
        t5_ids: torch.Tensor,  # (B, T)
    ) -> torch.Tensor:  # (B, L, 64)
        side = int(noisy.shape[1] ** 0.5)
        img_ids = torch.zeros(side, side, 3, device=noisy.device)
        img_ids[..., 1] += torch.arange(side, device=noisy.device)[:, None]
        img_ids[..., 2] += torch.arange(side, device=noisy.device)[None, :]
        return self.transformer(
            hidden_states=torch.cat([noisy, control], 2),
            timestep=sigma,
            guidance=guidance,
            pooled_projections=self.clip(clip_ids).pooler_output,
            encoder_hidden_states=self.t5(t5_ids)[0],
            txt_ids=torch.zeros(t5_ids.shape[1], 3, device=noisy.device),
            img_ids=img_ids.view(-1, 3),
            return_dict=False,
        )[0]
