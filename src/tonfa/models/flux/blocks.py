"""FLUX's two kinds of blocks, written over fused ops; names and order are those of `plan.py`.

The image and the text stream have their own weights in a double block and share them in a single one. Text tokens come
first wherever the streams are joined, as in Diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from tonfa.layers.attention import Attention
from tonfa.layers.fused import FusedLinear, QuantizedInput, SharedInput
from tonfa.layers.modulation import Modulation
from tonfa.layers.offload import offloadable
from tonfa.models.flux.plan import MLP_RATIO
from tonfa.ops.fused import RMS_NORM_EPS, Rotary


class Layers(Protocol):
    """Makes a block's layers, with 4-bit or with 16-bit weights, by their full names in the model."""

    def linear(self, name: str, in_features: int, out_features: int) -> FusedLinear:
        """A linear."""
        ...

    def modulation(self, name: str, hidden_size: int, chunks: int) -> Modulation:
        """A modulation; `name` is its linear's."""
        ...


class FeedForward(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, name: str, hidden_size: int, layers: Layers) -> None:
        super().__init__()
        self.up = layers.linear(f"{name}.up", hidden_size, MLP_RATIO * hidden_size)
        self.down = layers.linear(f"{name}.down", MLP_RATIO * hidden_size, hidden_size)

    def forward(self, x: QuantizedInput, residual: Tensor, gate: Tensor) -> Tensor:
        """Residual + gate * down(gelu(up(x))), with x the quantized input of `up`."""
        return self.down.product_gate_residual(self.up.product_gelu_quantize(x, self.down), residual, gate)


class SingleAttention(nn.Module):
    """Attention over the joined tokens."""

    def __init__(self, name: str, hidden_size: int, head_dim: int, layers: Layers) -> None:
        super().__init__()
        self.to_qkv = layers.linear(f"{name}.to_qkv", hidden_size, 3 * hidden_size)
        self.norm_q = nn.RMSNorm(head_dim, eps=RMS_NORM_EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=RMS_NORM_EPS)
        self.to_out = layers.linear(f"{name}.to_out", hidden_size, hidden_size)
        self.attention = Attention()

    def forward(self, x: QuantizedInput, rotary: Rotary, mask: Tensor | None) -> Tensor:
        """(B, L, H * D): the input of `to_out`."""
        norm_q, norm_k = self.norm_q.weight, self.norm_k.weight
        q, k, v = self.to_qkv.product_norm_rope(x, norm_q, norm_k, rotary)
        return self.attention(self.to_qkv, q, k, v, mask, (norm_q,), (norm_k,))


class JointAttention(nn.Module):
    """Attention of text and image tokens to each other, each stream with its own projections."""

    def __init__(self, name: str, hidden_size: int, head_dim: int, layers: Layers) -> None:
        super().__init__()
        self.to_qkv = layers.linear(f"{name}.to_qkv", hidden_size, 3 * hidden_size)
        self.add_qkv_proj = layers.linear(f"{name}.add_qkv_proj", hidden_size, 3 * hidden_size)
        self.norm_q = nn.RMSNorm(head_dim, eps=RMS_NORM_EPS)
        self.norm_k = nn.RMSNorm(head_dim, eps=RMS_NORM_EPS)
        self.norm_added_q = nn.RMSNorm(head_dim, eps=RMS_NORM_EPS)
        self.norm_added_k = nn.RMSNorm(head_dim, eps=RMS_NORM_EPS)
        self.to_out = layers.linear(f"{name}.to_out", hidden_size, hidden_size)
        self.to_add_out = layers.linear(f"{name}.to_add_out", hidden_size, hidden_size)
        self.attention = Attention()

    def forward(
        self,
        img: QuantizedInput,
        txt: QuantizedInput,
        img_rotary: Rotary,
        txt_rotary: Rotary,
        mask: Tensor | None,
        stream: Tensor,  # (B, L_img, hidden), for its batch and dtype
    ) -> tuple[Tensor, Tensor]:
        """(B, L_img, H * D) and (B, L_txt, H * D): the inputs of `to_out` and `to_add_out`."""
        text_length, head_dim = txt_rotary[0].shape
        length, heads = text_length + img_rotary[0].shape[0], self.to_qkv.out_features // (3 * head_dim)
        # In memory (B, L, H, D), as attention kernels return their output.
        qkv = txt_rotary[0].new_empty((3, stream.shape[0], length, heads, head_dim), dtype=stream.dtype).transpose(2, 3)
        norm_q = self.norm_added_q.weight, self.norm_q.weight
        norm_k = self.norm_added_k.weight, self.norm_k.weight
        self.add_qkv_proj.product_norm_rope_into(txt, norm_q[0], norm_k[0], txt_rotary, qkv, 0)
        self.to_qkv.product_norm_rope_into(img, norm_q[1], norm_k[1], img_rotary, qkv, text_length)
        q, k, v = qkv.unbind(0)
        joined = self.attention(self.to_qkv, q, k, v, mask, norm_q, norm_k)
        return joined[:, text_length:], joined[:, :text_length]


class DoubleBlock(nn.Module):
    """Separate streams of image and text, joined in the attention."""

    def __init__(self, name: str, hidden_size: int, head_dim: int, layers: Layers) -> None:
        super().__init__()
        self.norm1 = layers.modulation(f"{name}.norm1.linear", hidden_size, 6)
        self.norm1_context = layers.modulation(f"{name}.norm1_context.linear", hidden_size, 6)
        self.attn = JointAttention(f"{name}.attn", hidden_size, head_dim, layers)
        self.ff = FeedForward(f"{name}.ff", hidden_size, layers)
        self.ff_context = FeedForward(f"{name}.ff_context", hidden_size, layers)

    def modulations(self) -> tuple[Modulation, ...]:
        """Of the image and of the text."""
        return self.norm1, self.norm1_context

    @offloadable
    def forward(
        self,
        img: Tensor,  # (B, L_img, hidden)
        txt: Tensor,  # (B, L_txt, hidden)
        vec: Tensor,  # (B, hidden)
        img_rotary: Rotary,  # (L_img, head_dim) each
        txt_rotary: Rotary,  # (L_txt, head_dim) each
        mask: Tensor | None = None,
        modulated: Sequence[Tensor | None] = (None, None),  # of `modulations`, where it is computed already
    ) -> tuple[Tensor, Tensor]:
        """The image and the text stream after this block."""
        attn, (img_mod, txt_mod) = self.attn, modulated
        img_shift, img_scale, img_gate, img_ff_shift, img_ff_scale, img_ff_gate = self.norm1(vec, img_mod)
        txt_shift, txt_scale, txt_gate, txt_ff_shift, txt_ff_scale, txt_ff_gate = self.norm1_context(vec, txt_mod)

        img_in = attn.to_qkv.norm_modulate_quantize(img, img_scale, img_shift)
        txt_in = attn.add_qkv_proj.norm_modulate_quantize(txt, txt_scale, txt_shift)
        img_attn, txt_attn = attn(img_in, txt_in, img_rotary, txt_rotary, mask, img)
        img = attn.to_out.product_gate_residual(attn.to_out.quantize(img_attn), img, img_gate)
        txt = attn.to_add_out.product_gate_residual(attn.to_add_out.quantize(txt_attn), txt, txt_gate)

        img = self.ff(self.ff.up.norm_modulate_quantize(img, img_ff_scale, img_ff_shift), img, img_ff_gate)
        txt = self.ff_context(
            self.ff_context.up.norm_modulate_quantize(txt, txt_ff_scale, txt_ff_shift), txt, txt_ff_gate
        )
        return img, txt


class SingleBlock(nn.Module):
    """One stream of text and image tokens; attention and MLP read the same normalized input."""

    def __init__(self, name: str, hidden_size: int, head_dim: int, layers: Layers) -> None:
        super().__init__()
        self.norm = layers.modulation(f"{name}.norm.linear", hidden_size, 3)
        self.attn = SingleAttention(f"{name}.attn", hidden_size, head_dim, layers)
        self.ff = FeedForward(f"{name}.ff", hidden_size, layers)
        self._inputs = SharedInput(self.attn.to_qkv, self.ff.up)

    def modulations(self) -> tuple[Modulation, ...]:
        """The only one."""
        return (self.norm,)

    @offloadable
    def forward(
        self,
        x: Tensor,  # (B, L, hidden), text tokens first
        vec: Tensor,  # (B, hidden)
        rotary: Rotary,  # (L, head_dim) each
        mask: Tensor | None = None,
        modulated: Sequence[Tensor | None] = (None,),  # of `modulations`, where it is computed already
    ) -> Tensor:
        """The stream after this block."""
        shift, scale, gate = self.norm(vec, *modulated)
        qkv_in, ff_in = self._inputs.norm_modulate_quantize(x, scale, shift)
        attention = self.attn(qkv_in, rotary, mask)
        x = self.attn.to_out.product_gate_residual(self.attn.to_out.quantize(attention), x, gate)
        return self.ff(ff_in, x, gate)
