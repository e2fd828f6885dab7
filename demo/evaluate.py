"""Scores a FluxControlPipeline on held-out scenes: do shapes follow the depth map, do colors follow the prompt?

    python demo/evaluate.py --model demo/model --scenes 256 --out metrics.jsonl --sheet sheet.png

Three runs share scenes and noise: the true inputs, each scene with another scene's control image (what a model that
ignores its control would score) and each with another scene's prompt (what one that ignores its prompt would score).
The renderings themselves give the ceiling of every figure. Half of the scenes hold a color-shape pair that training
never showed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxControlPipeline
from PIL import Image

from captions import full_captions
from render import Rendering, control_image, render_all
from scenes import CALIBRATION_SEED, COLORS, EVALUATION_SEED, Scenes, has_held_out, sample_scenes
from tonfa.evaluate.adherence import ColorTable, edge_scores, object_colors


@dataclass
class Problems:
    """Held-out scenes with their renderings, control images and prompts."""

    scenes: Scenes
    truth: Rendering
    control: torch.Tensor  # (B, H, W) uint8
    prompts: list[str]


def make_problems(count: int, resolution: int = 256, device: str = "cpu", seed: int = EVALUATION_SEED) -> Problems:
    scenes = sample_scenes(seed, count, held_out="alternate")
    truth = render_all(scenes, resolution, device, batch=16)
    truth = Rendering(truth.rgb.cpu(), truth.depth.cpu(), truth.mask.cpu())
    return Problems(scenes, truth, control_image(truth.depth), full_captions(scenes))


@torch.no_grad()
def generate(
    pipeline: FluxControlPipeline,
    prompts: list[str],
    control: torch.Tensor,  # (B, H, W) uint8
    *,
    steps: int = 30,
    guidance: float = 10.0,
    max_sequence_length: int = 512,
    batch: int = 32,
) -> torch.Tensor:  # (B, 3, H, W) uint8
    """Scene i always gets the noise of seed i, drawn on the CPU."""
    images = []
    pipeline.set_progress_bar_config(disable=True)
    for i in range(0, len(prompts), batch):
        picture = control[i : i + batch, None].expand(-1, 3, -1, -1).float() / 127.5 - 1
        images.append(
            pipeline(
                prompt=prompts[i : i + batch],
                control_image=picture,
                height=control.shape[1],
                width=control.shape[2],
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=max_sequence_length,
                generator=[torch.Generator().manual_seed(i + k) for k in range(len(picture))],
                output_type="pt",
            ).images
        )
    return (torch.cat(images).float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)


@dataclass
class Objects:
    """Every object that is large enough to score."""

    scene: torch.Tensor  # (N,)
    color: torch.Tensor  # (N,) true index in COLORS
    held_out: torch.Tensor  # (N,) bool
    feature: torch.Tensor  # (N, 3) median Lab inside the true mask


def scored_objects(rgb: torch.Tensor, mask: torch.Tensor, scenes: Scenes) -> Objects:
    """The colors of `rgb` where the scenes' objects are seen."""
    unseen = has_held_out(scenes)
    found = object_colors(rgb, mask, scenes.count.tolist())
    if not found:
        raise ValueError(f"none of {len(scenes)} scenes has an object that is large enough")
    scene, slot = torch.tensor([(o.picture, o.index) for o in found]).unbind(1)
    return Objects(scene, scenes.color[scene, slot], unseen[scene, slot], torch.stack([o.feature for o in found]))


def color_names(resolution: int = 256, device: str = "cpu", scenes: int = 256) -> ColorTable:
    """The colors of objects of calibration renderings."""
    known = sample_scenes(CALIBRATION_SEED, scenes, held_out="alternate")
    rendering = render_all(known, resolution, device, batch=16)
    objects = scored_objects(rendering.rgb.cpu(), rendering.mask.cpu(), known)
    return ColorTable(COLORS, objects.feature, objects.color)


def score(images: torch.Tensor, problems: Problems, names: ColorTable) -> dict[str, float]:
    """All figures of one set of images (B, 3, H, W) uint8."""
    edges = edge_scores(images, problems.truth.mask)
    objects = scored_objects(images, problems.truth.mask, problems.scenes)
    right = (names.classify(objects.feature) == objects.color).float()
    error = (images.float() - problems.truth.rgb.float()).square().mean((1, 2, 3)).clamp_min(1e-3)
    result = {f"silhouette_{name}": values.mean().item() for name, values in edges.items()}
    result |= {"color_accuracy": right.mean().item(), "objects": len(right)}
    for label, rows in (("seen", ~objects.held_out), ("unseen", objects.held_out)):
        if rows.any():
            result |= {
                f"color_accuracy_{label}_pairs": right[rows].mean().item(),
                f"objects_{label}_pairs": int(rows.sum()),
            }
    return result | {"psnr_to_rendering": (10 * (255**2 / error).log10()).mean().item()}


def evaluate(
    pipeline: FluxControlPipeline,
    problems: Problems,
    names: ColorTable,
    *,
    baselines: bool = True,
    **options: float,
) -> tuple[dict[str, dict[str, float]], torch.Tensor]:
    """Figures by condition, and the images of the true condition. `options` go to `generate`."""
    other_prompts = problems.prompts[1:] + problems.prompts[:1]
    images = generate(pipeline, problems.prompts, problems.control, **options)
    result = {"ceiling": score(problems.truth.rgb, problems, names), "model": score(images, problems, names)}
    if baselines:
        swapped = generate(pipeline, problems.prompts, problems.control.roll(-1, 0), **options)
        result["control_of_another_scene"] = score(swapped, problems, names)
        swapped = generate(pipeline, other_prompts, problems.control, **options)
        result["prompt_of_another_scene"] = score(swapped, problems, names)
    return result, images


def save_sheet(path: Path, problems: Problems, images: torch.Tensor, count: int = 16, columns: int = 8) -> None:
    """Rows of control image, generated image, rendering."""
    rows = []
    for i in range(0, min(count, len(images)), columns):
        pick = slice(i, min(i + columns, count, len(images)))
        control = problems.control[pick, None].expand(-1, 3, -1, -1)
        for kind in (control, images[pick], problems.truth.rgb[pick]):
            line = torch.cat(list(kind), 2)
            rows.append(F.pad(line, (0, columns * images.shape[-1] - line.shape[-1])))
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy().astype(np.uint8)).save(path)


def load_pipeline(model: Path, transformer: Path | None, device: str, dtype: torch.dtype) -> FluxControlPipeline:
    """The model folder, with a quantized transformer in place of its own where one is given."""
    replaced = {}
    if transformer is not None:
        from tonfa import SVDQFluxTransformer2DModel

        replaced["transformer"] = SVDQFluxTransformer2DModel.from_pretrained(transformer)
    return FluxControlPipeline.from_pretrained(str(model), dtype=dtype, **replaced).to(device)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, help="checkpoint of a quantized transformer")
    parser.add_argument("--scenes", type=int, default=256)
    parser.add_argument("--calibration", type=int, default=256, help="scenes that teach the color names")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=10.0)
    parser.add_argument("--max-sequence-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--out", type=Path, help="JSON lines; one is appended")
    parser.add_argument("--sheet", type=Path, help="PNG of the first scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    args = parser.parse_args(argv)

    pipeline = load_pipeline(args.model, args.transformer, args.device, getattr(torch, args.dtype))
    problems = make_problems(args.scenes, args.resolution, args.device)
    names = color_names(args.resolution, args.device, args.calibration)
    result, images = evaluate(
        pipeline,
        problems,
        names,
        baselines=args.baselines,
        steps=args.steps,
        guidance=args.guidance,
        max_sequence_length=args.max_sequence_length,
        batch=args.batch,
    )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("out", "sheet")}
    if args.sheet is not None:
        save_sheet(args.sheet, problems, images)
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(json.dumps({"settings": settings, "results": result}) + "\n")
    for condition, figures in result.items():
        print(condition + ": " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
