"""Trains the demo model from nothing: renders scenes, trains the VAE, then the transformer with both text encoders.

    python demo/train.py --out demo/model --budget-seconds 480

Rectified flow as in FLUX: x_t = (1 - sigma) x_0 + sigma noise, target noise - x_0, sigma logit-normal and shifted as
the scheduler shifts it. The last part distills classifier-free guidance into the guidance embedding. With a time budget
the number of steps follows from measured speed and is written to training.json; the same numbers given as --vae-steps
and --flow-steps repeat the run.
"""

import argparse
import copy
import json
import math
import tarfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxControlPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from components import (
    SIZES,
    TextToVelocity,
    build_scheduler,
    build_text_encoders,
    build_tokenizers,
    build_transformer,
)
from flow_training import FlowTrainer, flow_data
from pacing import START, log
from scenes import EVALUATION_SEED, TRAIN_SEED
from vae_training import fit_scale, render_pictures, train_vae, vae_psnr


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
    for config in out.glob("*/config.json"):  # loaded parts remember the folder that they came from
        fields = json.loads(config.read_text())
        fields.pop("_name_or_path", None)
        config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = args.device
    end = START + args.budget_seconds if args.budget_seconds else None
    torch.backends.cudnn.benchmark = True
    # Flash attention for the transformer, plain matrix products for the masked attention of the text encoders: with
    # these two kernels allowed, the backward at 512 tokens ended in an illegal memory access (torch 2.11, H200).
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.suppress_errors = True
    torch._dynamo.config.recompile_limit = 64
    arguments = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    record: dict[str, object] = {"arguments": arguments, "torch": torch.__version__}
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
    parser.add_argument("--distill", type=float, default=0.1, help="part of the flow steps spent on guidance")
    parser.add_argument("--shift", type=float, default=1.0, help="of sigma; the scheduler's is 0.5, more is noisier")
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
