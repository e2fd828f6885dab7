"""Trains the demo model from nothing: renders scenes, trains the VAE, then the transformer with both text encoders.

    python demo/train.py --out demo/model --budget-seconds 480

Rectified flow as in FLUX: x_t = (1 - sigma) x_0 + sigma noise, target noise - x_0, sigma logit-normal and shifted as
the scheduler shifts it. The last part distills classifier-free guidance into the guidance embedding. With a time budget
the number of steps follows from measured speed and is written to training.json; the same numbers given as --vae-steps
and --flow-steps repeat the run.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxControlPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from captions import captions
from components import (
    CLIP_LENGTH,
    SIZES,
    TextToVelocity,
    build_scheduler,
    build_text_encoders,
    build_tokenizers,
    build_transformer,
    build_vae,
)
from muon import BatchedMuon
from render import control_image, render
from scenes import EVALUATION_SEED, TRAIN_SEED, sample_scenes

# T5 lengths. The pipeline pads to max_sequence_length and attends to the padding, so both are trained.
SHORT, LONG = 64, 512
CAPTIONS_PER_SCENE = 3
CAPTION_DROPOUT = 0.1
MAX_GUIDANCE = 30.0

START = time.monotonic()


def log(message: str) -> None:
    print(f"[{time.monotonic() - START:6.1f}s] {message}", flush=True)


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def guidance_weight(guidance: torch.Tensor) -> torch.Tensor:
    """What a guidance scale means as classifier-free guidance: 1 at scale 1 (none), 2 at 10, 4.2 at 30."""
    return 1 + (guidance - 1) / 9


def cosine(step: int, steps: int, warmup: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass
class Pictures:
    rgb: torch.Tensor  # (N, 3, H, W) uint8
    control: torch.Tensor  # (N, H, W) uint8

    def batch(self, rows: torch.Tensor, control_rows: torch.Tensor) -> torch.Tensor:
        """Color and control pictures in -1..1, control repeated to three channels as the pipeline does."""
        control = self.control[control_rows][:, None].expand(-1, 3, -1, -1)
        return torch.cat([self.rgb[rows], control]).float() / 127.5 - 1


def render_pictures(seed: int, count: int, resolution: int, device: str, max_seconds: float, **kinds: str) -> Pictures:
    """Renders `count` scenes, or as many as the time allows."""
    batch, scenes, rgb, control = 64, sample_scenes(seed, count, **kinds), [], []
    start = time.monotonic()
    for i in range(0, count, batch):
        rendering = render(scenes[i : i + batch].to(device), resolution)
        rgb.append(rendering.rgb)
        control.append(control_image(rendering.depth))
        if i // batch % 50 == 0:
            sync(device)
            log(f"rendered {i + batch} of {count}")
            if time.monotonic() - start > max_seconds:
                log(f"rendering stops at {i + batch} scenes after {max_seconds:.0f} s")
                break
    return Pictures(torch.cat(rgb), torch.cat(control))


def seconds_per_call(call: Callable[[], object], device: str, warmup: int = 3, repeats: int = 8) -> float:
    for _ in range(warmup):
        call()
    sync(device)
    start = time.monotonic()
    for _ in range(repeats):
        call()
    sync(device)
    return (time.monotonic() - start) / repeats


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and mean squared error of a batch in -1..1."""
    with torch.autocast(device, dtype=torch.bfloat16):
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
    error = decoded.float() - images
    mse = error.square().mean()
    gradient = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + 2 * mse + 0.5 * gradient + 3e-5 * kl, mse


def train_vae(
    args: argparse.Namespace, pictures: Pictures, device: str, max_seconds: float | None
) -> tuple[AutoencoderKL, int]:
    torch.manual_seed(args.seed)
    vae = build_vae(SIZES[args.size], args.resolution).to(device, memory_format=torch.channels_last)
    log(f"VAE: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters")
    draw = torch.Generator(device).manual_seed(args.seed)

    def optimizer_for(model: AutoencoderKL) -> torch.optim.AdamW:
        return torch.optim.AdamW(
            model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=1e-3, fused=device == "cuda"
        )

    def step(model: AutoencoderKL, optimizer: torch.optim.AdamW, draw: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(pictures.rgb), (args.vae_batch,), generator=draw, device=device)
        split = args.vae_batch * 3 // 4
        images = pictures.batch(rows[:split], rows[split:]).contiguous(memory_format=torch.channels_last)
        loss, mse = vae_loss(model, images, device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return mse.detach()

    steps = args.vae_steps
    if steps is None:
        trial = copy.deepcopy(vae)
        trial_optimizer, trial_draw = optimizer_for(trial), torch.Generator(device).manual_seed(0)
        seconds = seconds_per_call(lambda: step(trial, trial_optimizer, trial_draw), device, warmup=6, repeats=12)
        del trial, trial_optimizer
        steps = max(10, int(max_seconds / seconds))
        log(f"VAE: {seconds * 1e3:.1f} ms a step, {steps} steps in {max_seconds:.0f} s")

    torch.manual_seed(args.seed)
    optimizer = optimizer_for(vae)
    deadline = None if max_seconds is None else time.monotonic() + 1.15 * max_seconds
    for i in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = args.vae_lr * cosine(i, steps, min(100, steps // 10 + 1))
        mse = step(vae, optimizer, draw)
        if i % args.log_every == 0 or i == steps - 1:
            log(f"vae step {i:5d}/{steps}  psnr {-10 * math.log10(mse.item() / 4):.2f} dB")
            if deadline is not None and time.monotonic() > deadline:
                log("VAE: out of time")
                steps = i + 1
                break
    return vae, steps


@torch.no_grad()
def fit_scale(vae: AutoencoderKL, pictures: Pictures, device: str) -> None:
    """Rounds the weights to bf16 and sets shift and scale: latents of color pictures get mean 0 and deviation 1."""
    vae.to(torch.bfloat16).eval()
    rows = torch.arange(min(512, len(pictures.rgb)), device=device)
    latents = torch.cat(
        [vae.encode(pictures.batch(r, r[:0]).bfloat16()).latent_dist.mean.float() for r in rows.split(32)]
    )
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    spread = latents.std((0, 2, 3))
    log(
        f"VAE: shift {vae.config.shift_factor:.4f} scale {vae.config.scaling_factor:.4f}, "
        f"channels {spread.min():.2f}..{spread.max():.2f}"
    )


@torch.no_grad()
def vae_psnr(vae: AutoencoderKL, pictures: Pictures) -> dict[str, float]:
    """Mean over pictures of the reconstruction's PSNR, on the pictures given."""
    result = {}
    rows = torch.arange(len(pictures.rgb), device=pictures.rgb.device)
    for kind, pick in (("rgb", lambda r: (r, r[:0])), ("control", lambda r: (r[:0], r))):
        values = []
        for r in rows.split(32):
            images = pictures.batch(*pick(r))
            decoded = vae.decode(vae.encode(images.to(vae.dtype)).latent_dist.mode()).sample.float().clamp(-1, 1)
            values.append(-10 * ((decoded - images).square().mean((1, 2, 3)) / 4).log10())
        result[kind] = torch.cat(values).mean().item()
    return result


def pack_latents(latents: torch.Tensor) -> torch.Tensor:
    """(B, 16, h, w) -> (B, h/2 * w/2, 64), FluxControlPipeline's order."""
    return FluxControlPipeline._pack_latents(latents, *latents.shape)


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed, scaled latents (N, L, 64) bf16: of color pictures, and mean and deviation of those of control pictures.

    The pipeline samples the control's posterior anew in every call, so training has to as well.
    """
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    packed: tuple[list[torch.Tensor], ...] = ([], [], [])
    for rows in torch.arange(len(pictures.rgb), device=pictures.rgb.device).split(64):
        posterior = vae.encode(pictures.batch(rows, rows).to(vae.dtype)).latent_dist
        color, control = ((posterior.mean - shift) * scale).chunk(2)
        deviation = posterior.std.chunk(2)[1] * scale
        for store, latents in zip(packed, (color, control, deviation), strict=True):
            store.append(pack_latents(latents.contiguous()).bfloat16())
    return torch.cat(packed[0]), torch.cat(packed[1]), torch.cat(packed[2])


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


def save_pipeline(
    out: Path, vae: AutoencoderKL, model: TextToVelocity, tokenizers: tuple[CLIPTokenizer, T5TokenizerFast]
) -> None:
    copies = {
        name: copy.deepcopy(getattr(model, name)).to("cpu", torch.bfloat16) for name in ("transformer", "clip", "t5")
    }
    FluxControlPipeline(
        scheduler=build_scheduler(),
        vae=copy.deepcopy(vae).to("cpu", torch.bfloat16),
        text_encoder=copies["clip"],
        tokenizer=tokenizers[0],
        text_encoder_2=copies["t5"],
        tokenizer_2=tokenizers[1],
        transformer=copies["transformer"],
    ).save_pretrained(out)
    total = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    log(f"saved {out}: {total / 1e6:.2f} MB")


def pack_parts(folder: Path, parts: Path, part_bytes: int = 15_000_000) -> None:
    """Writes the folder as model.tar.00, .01, ... of at most `part_bytes`; `cat model.tar.* | tar x` restores it."""
    parts.mkdir(parents=True, exist_ok=True)
    for old in parts.glob("model.tar.*"):
        old.unlink()
    whole = parts / "model.tar"
    with tarfile.open(whole, "w") as tar:
        tar.add(folder, arcname=folder.name)
    data = whole.read_bytes()
    whole.unlink()
    for i in range(0, len(data), part_bytes):
        (parts / f"model.tar.{i // part_bytes:02d}").write_bytes(data[i : i + part_bytes])


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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = args.device
    end = START + args.budget_seconds if args.budget_seconds else None
    torch.backends.cudnn.benchmark = True
    # Flash attention for the transformer, plain matrix products for the masked attention of the text encoders: the
    # memory-efficient kernel's backward fails on the T5 bias (illegal memory access with torch 2.11, 512 tokens).
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 64
    record: dict[str, object] = {"arguments": vars(args) | {"out": str(args.out)}, "torch": torch.__version__}
    if device == "cuda":
        record["device"] = torch.cuda.get_device_name()

    def remaining() -> float | None:
        return None if end is None else end - time.monotonic()

    render_limit = math.inf if end is None else 0.2 * args.budget_seconds
    pictures = render_pictures(args.scene_seed, args.scenes, args.resolution, device, render_limit)
    record["scenes"] = len(pictures.rgb)
    log(f"{len(pictures.rgb)} training scenes")

    if args.stage in ("vae", "all"):
        vae_seconds = None if end is None else args.vae_share * args.budget_seconds
        vae, record["vae_steps"] = train_vae(args, pictures, device, vae_seconds)
        fit_scale(vae, pictures, device)
        vae.save_pretrained(args.out / "vae")
    else:
        vae = AutoencoderKL.from_pretrained(args.vae, dtype=torch.bfloat16).to(device).eval()

    def finish(model: TextToVelocity | None) -> None:
        if model is not None:
            save_pipeline(args.out, vae, model, tokenizers)
        record["seconds"] = round(time.monotonic() - START, 1)
        (args.out / "training.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        if args.parts is not None:
            pack_parts(args.out, args.parts)

    held_out = render_pictures(
        EVALUATION_SEED, min(64, args.scenes), args.resolution, device, math.inf, held_out="alternate"
    )
    record["vae_psnr"] = vae_psnr(vae, held_out)
    log(f"VAE on held-out scenes: {record['vae_psnr']}")
    finish(None)
    if args.stage == "vae":
        return

    tokenizers = build_tokenizers()
    data = flow_data(vae, pictures, args.scene_seed, tokenizers)
    del pictures
    if device == "cuda":
        torch.cuda.empty_cache()
    torch.manual_seed(args.seed + 1)
    size = SIZES[args.size]
    parts = (build_transformer(size), *build_text_encoders(size, *tokenizers))
    if args.continue_from is not None:
        loaded = load_parts(args.continue_from)
        parts = (loaded[0], *parts[1:]) if args.new_text else loaded
        record["continued_from"] = json.loads((args.continue_from / "training.json").read_text())
    model = TextToVelocity(*parts).to(device).train()
    log(
        "parameters: "
        + ", ".join(f"{n} {sum(p.numel() for p in m.parameters()) / 1e6:.2f} M" for n, m in model.named_children())
    )
    trainer = FlowTrainer(args, model, data, device)
    deadline = None if end is None else end - args.reserve_seconds
    steps = args.flow_steps if args.flow_steps is not None else trainer.plan_steps(deadline)
    record["flow_steps"] = trainer.train(steps, deadline, lambda: finish(trainer.average))
    if device == "cuda":
        record["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
    log(f"done, {remaining() or 0:.0f} s of the budget left; {record.get('peak_gb')} GB at most")
    finish(trainer.average)


def load_parts(folder: Path) -> tuple[FluxTransformer2DModel, CLIPTextModel, T5EncoderModel]:
    """Transformer and text encoders of a trained model, in float32."""
    return (
        FluxTransformer2DModel.from_pretrained(folder / "transformer", dtype=torch.float32),
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--parts", type=Path, help="folder for the same model as a tar file in parts of 15 MB")
    parser.add_argument("--stage", choices=("vae", "flow", "all"), default="all")
    parser.add_argument("--vae", type=Path, help="folder of a trained VAE, for --stage flow")
    parser.add_argument("--budget-seconds", type=float, help="time for everything; sets the numbers of steps")
    parser.add_argument("--reserve-seconds", type=float, default=12.0, help="part of the budget kept for saving")
    parser.add_argument("--vae-share", type=float, default=0.24, help="part of the budget for the VAE")
    parser.add_argument("--vae-steps", type=int)
    parser.add_argument("--flow-steps", type=int)
    parser.add_argument("--scenes", type=int, default=40_000)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--size", choices=tuple(SIZES), default="demo")
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--vae-lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--long-share", type=float, default=0.06, help="part of the steps with texts of 512 tokens")
    parser.add_argument("--distill", type=float, default=0.15, help="part of the flow steps spent on guidance")
    parser.add_argument("--shift", type=float, default=0.5, help="of sigma; the scheduler's is 0.5, more is noisier")
    parser.add_argument("--continue-from", type=Path, help="folder of a trained model to start from")
    parser.add_argument("--new-text", action="store_true", help="continue with the transformer, not the text encoders")
    parser.add_argument("--scene-seed", type=int, default=TRAIN_SEED)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args(argv)
    if args.stage == "flow" and args.vae is None:
        parser.error("--stage flow needs --vae")
    if args.budget_seconds is None:
        missing = [n for n in ("vae", "flow") if args.stage in (n, "all") and getattr(args, f"{n}_steps") is None]
        if missing:
            parser.error(f"give --budget-seconds or --{missing[0]}-steps")
    return args


if __name__ == "__main__":
    main()
