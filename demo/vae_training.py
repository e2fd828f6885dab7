"""The first stage of the training: pictures, the VAE that learns them, and their latents."""

import argparse
import copy
import math
import time
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, FluxControlPipeline

from components import (
    SIZES,
    build_vae,
)
from pacing import cosine, log, seconds_per_call, sync
from render import control_image, render
from scenes import sample_scenes


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
