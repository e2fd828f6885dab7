"""The second stage of the training: the transformer with both text encoders, by rectified flow on latents."""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import CLIPTokenizer, T5TokenizerFast

from captions import captions
from components import (
    CLIP_LENGTH,
    TextToVelocity,
)
from muon import BatchedMuon
from pacing import cosine, log, seconds_per_call, sync
from scenes import sample_scenes
from vae_training import Pictures, encode_pictures

# T5 lengths. The pipeline pads to max_sequence_length and attends to the padding, so both are trained.
SHORT, LONG = 64, 512
CAPTIONS_PER_SCENE = 3
CAPTION_DROPOUT = 0.1
MAX_GUIDANCE = 30.0


def guidance_weight(guidance: torch.Tensor) -> torch.Tensor:
    """What a guidance scale means as classifier-free guidance: 1 at scale 1 (none), 2 at 10, 4.2 at 30."""
    return 1 + (guidance - 1) / 9


@dataclass
class FlowData:
    """Everything the flow stage reads; all of it stays on the device."""

    latents: torch.Tensor  # (N, L, 64) bf16
    control: torch.Tensor  # (N, L, 64) bf16, mean
    deviation: torch.Tensor  # (N, L, 64) bf16, of the control
    clip_ids: torch.Tensor  # (C * N, 77), caption c of scene i in row c * N + i
    t5_ids: torch.Tensor  # (C * N, 64)
    empty_clip: torch.Tensor  # (77,)
    empty_t5: torch.Tensor  # (64,)
    t5_pad: int


def tokenize(
    tokenizers: tuple[CLIPTokenizer, T5TokenizerFast], texts: list[str], device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = []
    for tokenizer, length in zip(tokenizers, (CLIP_LENGTH, SHORT), strict=True):
        rows = tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
        if rows.shape[1] != length:
            raise ValueError(f"a caption has {rows.shape[1]} tokens, more than {length}")
        ids.append(rows.to(torch.int16).to(device))
    return ids[0], ids[1]


@dataclass
class Batch:
    noisy: torch.Tensor
    target: torch.Tensor
    control: torch.Tensor
    sigma: torch.Tensor
    guidance: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor


def draw_batch(data: FlowData, count: int, length: int, mu: float, draw: torch.Generator) -> Batch:
    device, scenes = data.latents.device, len(data.latents)
    rows = torch.randint(scenes, (count,), generator=draw, device=device)
    text = rows + scenes * torch.randint(len(data.t5_ids) // scenes, (count,), generator=draw, device=device)
    uniform = torch.rand(4, count, generator=draw, device=device)
    dropped = (uniform[0] < CAPTION_DROPOUT)[:, None]
    t5_ids = torch.where(dropped, data.empty_t5, data.t5_ids[text]).long()
    t5_ids = F.pad(t5_ids, (0, length - t5_ids.shape[1]), value=data.t5_pad)

    # Mostly logit-normal; a sixth uniform, so that the first and last steps of the sampler are seen often enough.
    t = torch.randn(count, generator=draw, device=device).sigmoid()
    t = torch.where(uniform[1] < 1 / 6, uniform[2], t).clamp(1e-3, 1)
    sigma = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    clean = data.latents[rows].float()
    noise = torch.randn(clean.shape, generator=draw, device=device)
    jitter = torch.randn(clean.shape, generator=draw, device=device)
    return Batch(
        noisy=torch.lerp(clean, noise, sigma[:, None, None]),
        target=noise - clean,
        control=torch.addcmul(data.control[rows].float(), data.deviation[rows].float(), jitter),
        sigma=sigma,
        guidance=1 + (MAX_GUIDANCE - 1) * uniform[3],
        clip_ids=torch.where(dropped, data.empty_clip, data.clip_ids[text]).long(),
        t5_ids=t5_ids,
    )


@torch.no_grad()
def guided_target(teacher: TextToVelocity, data: FlowData, batch: Batch, device: str) -> torch.Tensor:
    """v_u + w (v_c - v_u) of the frozen teacher, both in one pass."""
    count, length = batch.t5_ids.shape
    empty_t5 = F.pad(data.empty_t5.long(), (0, length - SHORT), value=data.t5_pad).expand(count, -1)
    empty_clip = data.empty_clip.long().expand(count, -1)
    with torch.autocast(device, dtype=torch.bfloat16):
        both = teacher(
            *(torch.cat([x, x]) for x in (batch.noisy, batch.control, batch.sigma, batch.guidance)),
            torch.cat([batch.clip_ids, empty_clip]),
            torch.cat([batch.t5_ids, empty_t5]),
        ).float()
    conditional, unconditional = both.chunk(2)
    return torch.lerp(unconditional, conditional, guidance_weight(batch.guidance)[:, None, None])


class FlowTrainer:
    """Model, its running average, and one training step."""

    def __init__(self, args: argparse.Namespace, model: TextToVelocity, data: FlowData, device: str) -> None:
        self.args, self.model, self.data, self.device = args, model, data, device
        self.text_lengths = {SHORT: 1 - args.long_share} | ({LONG: args.long_share} if args.long_share else {})
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        self.mu = args.shift
        self.start_optimizers()
        if args.compile:
            self.model.transformer.compile_repeated_blocks(dynamic=False)

    def start_uncompiled(self) -> None:
        for block in [*self.model.transformer.transformer_blocks, *self.model.transformer.single_transformer_blocks]:
            block._compiled_call_impl = None

    def start_optimizers(self) -> None:
        blocks = [*self.model.transformer.transformer_blocks, *self.model.transformer.single_transformer_blocks]
        matrices = [
            p for block in blocks for name, p in block.named_parameters() if p.ndim == 2 and not name.startswith("norm")
        ]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.muon = BatchedMuon(matrices)
        self.adamw = torch.optim.AdamW(
            others, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=self.device == "cuda"
        )

    def batch_size(self, length: int) -> int:
        """Half the batch where the text is as long as it gets, to bound memory."""
        return self.args.batch if length < LONG else max(1, self.args.batch // 2)

    def step(self, length: int, draw: torch.Generator, factor: float, teacher: TextToVelocity | None) -> torch.Tensor:
        batch = draw_batch(self.data, self.batch_size(length), length, self.mu, draw)
        target = batch.target if teacher is None else guided_target(teacher, self.data, batch, self.device)
        # Only the frequent shape is worth compiling.
        stance = "default" if length == SHORT else "force_eager"
        with torch.compiler.set_stance(stance), torch.autocast(self.device, dtype=torch.bfloat16):
            velocity = self.model(batch.noisy, batch.control, batch.sigma, batch.guidance, batch.clip_ids, batch.t5_ids)
        loss = F.mse_loss(velocity.float(), target)
        for p in self.model.parameters():
            p.grad = None
        loss.backward()
        for p in self.model.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.adamw.param_groups:
            group["lr"] = self.args.lr * factor
        self.adamw.step()
        self.muon.step(self.args.lr * factor)
        return loss.detach()

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        decay = min(self.args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)

    def make_teacher(self) -> TextToVelocity:
        return copy.deepcopy(self.average)

    def plan_steps(self, deadline: float) -> int:
        """Compiles and times every kind of step, then puts the weights back; returns the number of steps that fit."""
        before = copy.deepcopy(self.model.state_dict())
        draw = torch.Generator(self.device).manual_seed(0)
        teacher = self.make_teacher()
        try:
            self.step(SHORT, draw, 1e-3, None)
        except RuntimeError as error:
            log(f"flow: the compiled step fails, going on without: {error}")
            self.start_uncompiled()
        expected = 0.0
        for length, chance in self.text_lengths.items():
            start = time.monotonic()
            plain = seconds_per_call(lambda n=length: self.step(n, draw, 1e-3, None), self.device)
            guided = plain
            if self.args.distill > 0:
                guided = seconds_per_call(lambda n=length: self.step(n, draw, 1e-3, teacher), self.device, repeats=4)
            log(
                f"flow: text {length}: {plain * 1e3:.1f} ms a step, {guided * 1e3:.1f} ms guided, "
                f"{time.monotonic() - start:.0f} s to time"
            )
            expected += chance * ((1 - self.args.distill) * plain + self.args.distill * guided)
        self.model.load_state_dict(before)
        self.start_optimizers()
        start = time.monotonic()
        for i in range(5):
            self.update_average(i)
        sync(self.device)
        expected += (time.monotonic() - start) / 5
        with torch.no_grad():
            torch._foreach_copy_(list(self.average.parameters()), list(self.model.parameters()))
        steps = max(10, int((deadline - time.monotonic()) / expected / 1.04))
        log(f"flow: {expected * 1e3:.1f} ms a step on average, {steps} steps")
        return steps

    def train(self, steps: int, deadline: float | None, checkpoint: Callable[[], None]) -> int:
        draw = torch.Generator(self.device).manual_seed(self.args.seed)
        lengths = torch.multinomial(
            torch.tensor(list(self.text_lengths.values())),
            steps,
            True,
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        lengths = [list(self.text_lengths)[k] for k in lengths.tolist()]
        distill_from = steps - int(steps * self.args.distill)
        teacher, running, count = None, torch.zeros((), device=self.device), 0
        for i in range(steps):
            if i == distill_from and i < steps:
                teacher = self.make_teacher()
                log("flow: guidance distillation begins")
            factor = cosine(i, steps, min(200, steps // 10 + 1))
            running += self.step(lengths[i], draw, factor, teacher)
            count += 1
            self.update_average(i)
            if i % self.args.log_every == 0 or i == steps - 1:
                log(f"flow step {i:5d}/{steps}  loss {running.item() / count:.4f}")
                running.zero_()
                count = 0
                if deadline is not None and time.monotonic() > deadline:
                    log("flow: out of time")
                    return i + 1
            if steps > 40 and i in (steps // 3, 2 * steps // 3):
                checkpoint()
        return steps


def flow_data(
    vae: AutoencoderKL, pictures: Pictures, scene_seed: int, tokenizers: tuple[CLIPTokenizer, T5TokenizerFast]
) -> FlowData:
    device = str(pictures.rgb.device.type)
    latents, control, deviation = encode_pictures(vae, pictures)
    scenes = sample_scenes(scene_seed, len(latents))
    texts = [text for wording in range(CAPTIONS_PER_SCENE) for text in captions(scenes, wording)]
    clip_ids, t5_ids = tokenize(tokenizers, texts, device)
    empty_clip, empty_t5 = tokenize(tokenizers, [""], device)
    log(f"encoded {len(latents)} scenes, {len(texts)} captions; control deviation {deviation[:256].float().mean():.3f}")
    return FlowData(
        latents, control, deviation, clip_ids, t5_ids, empty_clip[0], empty_t5[0], tokenizers[1].pad_token_id
    )
