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

MIN_PIXELS = 150  # at 256 x 256; objects with fewer visible pixels are not scored
EDGE_CONTRAST = 12.0  # change of Lab over two pixels that counts as an edge in the image
TOLERANCE = 2  # pixels


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


def lab(rgb: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 sRGB -> CIE Lab, D65."""
    x = rgb.float() / 255
    x = torch.where(x > 0.04045, ((x + 0.055) / 1.055) ** 2.4, x / 12.92)
    matrix = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = torch.einsum("ij,bjhw->bihw", matrix, x) / torch.tensor([0.9505, 1.0, 1.089])[:, None, None]
    f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116)
    return torch.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@dataclass
class Objects:
    """Every object that is large enough to score."""

    scene: torch.Tensor  # (N,)
    color: torch.Tensor  # (N,) true index in COLORS
    held_out: torch.Tensor  # (N,) bool
    feature: torch.Tensor  # (N, 3) median Lab inside the true mask


def object_colors(rgb: torch.Tensor, mask: torch.Tensor, scenes: Scenes) -> Objects:
    """The median color of `rgb` inside each object's true mask, less a border of one pixel."""
    values, unseen = lab(rgb), has_held_out(scenes)
    enough = MIN_PIXELS * (mask.shape[-1] / 256) ** 2
    rows = []
    for b in range(len(scenes)):
        for j in range(int(scenes.count[b])):
            own = (mask[b] == j + 1).float()[None, None]
            inner = (F.avg_pool2d(own, 3, 1, 1) > 0.99)[0, 0]
            if inner.sum() >= enough:
                rows.append((b, scenes.color[b, j].item(), unseen[b, j].item(), values[b][:, inner].median(1).values))
    if not rows:
        raise ValueError(f"none of {len(scenes)} scenes has an object of {enough:.0f} pixels")
    scene, color, held_out, feature = zip(*rows, strict=True)
    return Objects(torch.tensor(scene), torch.tensor(color), torch.tensor(held_out), torch.stack(feature))


class ColorNames:
    """Names a median color by the five nearest objects of calibration renderings."""

    def __init__(self, resolution: int = 256, device: str = "cpu", scenes: int = 256) -> None:
        known = sample_scenes(CALIBRATION_SEED, scenes, held_out="alternate")
        rendering = render_all(known, resolution, device, batch=16)
        self.table = object_colors(rendering.rgb.cpu(), rendering.mask.cpu(), known)

    def classify(self, feature: torch.Tensor) -> torch.Tensor:
        nearest = torch.cdist(feature, self.table.feature).topk(min(5, len(self.table.color)), largest=False).indices
        return F.one_hot(self.table.color[nearest], len(COLORS)).sum(1).argmax(1)


def silhouettes(mask: torch.Tensor) -> torch.Tensor:
    """(B, H, W) bool: pixels where an object borders something else."""
    edge = torch.zeros_like(mask, dtype=torch.bool)
    edge[:, :, 1:] |= mask[:, :, 1:] != mask[:, :, :-1]
    edge[:, 1:, :] |= mask[:, 1:, :] != mask[:, :-1, :]
    return edge


def image_edges(rgb: torch.Tensor) -> torch.Tensor:
    """(B, H, W) bool: local maxima of the Lab gradient, one or two pixels wide."""
    values = F.pad(lab(rgb), (1, 1, 1, 1), mode="replicate")
    gx = (values[:, :, 1:-1, 2:] - values[:, :, 1:-1, :-2]).norm(dim=1)
    gy = (values[:, :, 2:, 1:-1] - values[:, :, :-2, 1:-1]).norm(dim=1)
    wide = F.max_pool2d(gx[:, None], (1, 3), 1, (0, 1))[:, 0]
    tall = F.max_pool2d(gy[:, None], (3, 1), 1, (1, 0))[:, 0]
    return ((gx >= wide) & (gx > EDGE_CONTRAST) & (gx >= gy)) | ((gy >= tall) & (gy > EDGE_CONTRAST) & (gy >= gx))


def edge_scores(rgb: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per scene (B,): share of true silhouette pixels with an image edge nearby, the converse, and their F1.

    Floor patterns and shadows are image edges without a silhouette, so even a perfect picture has a low precision.
    """

    def near(edges: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(edges.float()[:, None], 2 * TOLERANCE + 1, 1, TOLERANCE)[:, 0] > 0

    true, found = silhouettes(mask), image_edges(rgb)
    recall = (true & near(found)).sum((1, 2)) / true.sum((1, 2)).clamp_min(1)
    precision = (found & near(true)).sum((1, 2)) / found.sum((1, 2)).clamp_min(1)
    return {
        "recall": recall,
        "precision": precision,
        "f1": 2 * recall * precision / (recall + precision).clamp_min(1e-6),
    }


def score(images: torch.Tensor, problems: Problems, names: ColorNames) -> dict[str, float]:
    """All figures of one set of images (B, 3, H, W) uint8."""
    edges = edge_scores(images, problems.truth.mask)
    objects = object_colors(images, problems.truth.mask, problems.scenes)
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
    names: ColorNames,
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
    names = ColorNames(args.resolution, args.device, args.calibration)
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
