"""`make demo`: quantizes the bundled model, then draws the same four pictures with 16-bit and with 4-bit weights.

Writes contact-sheet.png and the single pictures to out/demo, prints sizes, times and differences. On a GPU where there
is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from tonfa import SVDQFluxTransformer2DModel
from tonfa.checkpoint.tensors import TensorFolder, read_json
from tonfa.cli.pipeline import Placement, describe_transformer, quieten_libraries
from tonfa.evaluate.sheet import GAIN, Row, contact_sheet, difference
from tonfa.models.flux.plan import FluxDims, flux_plan
from tonfa.quantizer.recipe import Recipe
from tonfa.quantizer.stream import quantize_checkpoint

HERE = Path(__file__).resolve().parent
TEXT_LENGTH = 64  # tokens; the captions fit, and the model was trained with this length


@dataclass(frozen=True)
class Problem:
    """One row of the contact sheet."""

    prompt: str
    depth: Image.Image
    seed: int


@dataclass(frozen=True)
class Run:
    """What one transformer drew, and what that took."""

    pictures: list[Image.Image]
    seconds: list[float]
    memory: int


def read_problems(folder: Path) -> list[Problem]:
    rows = json.loads((folder / "prompts.json").read_text())
    problems = []
    for row in rows:
        with Image.open(folder / row["control_image"]) as depth:
            problems.append(Problem(row["prompt"], depth.convert("RGB"), row["seed"]))
    return problems


def quantize(source: Path, out: Path, device: torch.device) -> float:
    """Seconds taken."""
    config = read_json(source / "config.json")
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    dims = FluxDims(hidden, config["num_layers"], config["num_single_layers"], config["guidance_embeds"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are so small that waking threads takes longer than the work
    started = time.perf_counter()
    quantize_checkpoint(TensorFolder(source), flux_plan(dims), config, out, Recipe(), device=device)
    torch.set_num_threads(threads)
    return time.perf_counter() - started


def draw(pipe: Any, transformer: nn.Module, problems: list[Problem], steps: int, console: Console, name: str) -> Run:
    """One picture for each problem, after a step that is not timed: it chooses and compiles the kernels."""
    pipe.transformer = transformer
    picture(pipe, problems[0], 1)
    pictures, seconds = [], []
    for i, problem in enumerate(problems):
        started = time.perf_counter()
        pictures.append(picture(pipe, problem, steps))
        seconds.append(time.perf_counter() - started)
        console.print(f"  {name}: picture {i + 1} of {len(problems)} in {seconds[-1]:.1f} s")
    memory = sum(t.nbytes for t in (*transformer.parameters(), *transformer.buffers()))
    return Run(pictures, seconds, memory)


def picture(pipe: Any, problem: Problem, steps: int) -> Image.Image:
    result: Image.Image = pipe(
        prompt=problem.prompt,
        control_image=problem.depth,
        height=problem.depth.height,
        width=problem.depth.width,
        num_inference_steps=steps,
        guidance_scale=10.0,
        max_sequence_length=TEXT_LENGTH,
        generator=torch.Generator("cpu").manual_seed(problem.seed),
    ).images[0]
    return result


def psnr(a: Image.Image, b: Image.Image) -> float:
    """dB, of a picture whose values span 0 to 255."""
    error = np.mean((np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def sheet_of(problems: list[Problem], dense: Run, quantized: Run) -> Image.Image:
    """Columns depth, 16-bit, 4-bit, difference; the prompt above each row."""
    triples = zip(problems, dense.pictures, quantized.pictures, strict=True)
    rows = [Row(p.prompt, (p.depth, a, b, difference(a, b))) for p, a, b in triples]
    return contact_sheet(("depth map", "16-bit", "4-bit", f"difference x {GAIN}"), rows)


def table(problems: list[Problem], dense: Run, quantized: Run, on_disk: tuple[int, int]) -> Table:
    result = Table("transformer", "16-bit", "4-bit", "", box=None, pad_edge=False, header_style="bold")
    for name, a, b in (("on disk", *on_disk), ("in memory", dense.memory, quantized.memory)):
        result.add_row(name, f"{a / 1e6:.1f} MB", f"{b / 1e6:.1f} MB", f"{a / b:.2f} x smaller")
    pairs = zip(problems, dense.seconds, quantized.seconds, dense.pictures, quantized.pictures, strict=True)
    for i, (_, seconds, other_seconds, drawn, other) in enumerate(pairs):
        similarity = f"PSNR {psnr(drawn, other):.1f} dB"
        result.add_row(f"picture {i + 1}", f"{seconds:.1f} s", f"{other_seconds:.1f} s", similarity)
    return result


def weights_size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--inputs", type=Path, default=HERE / "inputs")
    parser.add_argument("--out", type=Path, default=HERE.parent / "out" / "demo")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    quieten_libraries()
    from diffusers import FluxControlPipeline

    device = torch.device(args.device)
    problems = read_problems(args.inputs)
    args.out.mkdir(parents=True, exist_ok=True)
    source, checkpoint = args.model / "transformer", args.out / "transformer-int4"
    if checkpoint.exists():
        console.print(f"{checkpoint} exists; remove it to quantize again")
    else:
        console.print(f"quantized {source} in {quantize(source, checkpoint, device):.1f} s")

    pipe = FluxControlPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    dense = draw(pipe, pipe.transformer, problems, args.steps, console, "16-bit")
    transformer = SVDQFluxTransformer2DModel.from_pretrained(checkpoint, torch_dtype=torch.bfloat16, device=device)
    quantized = draw(pipe, transformer, problems, args.steps, console, "4-bit ")

    for name, run in (("16-bit", dense), ("4-bit", quantized)):
        for i, drawn in enumerate(run.pictures):
            drawn.save(args.out / f"{i}-{name}.png")
    sheet = args.out / "contact-sheet.png"
    sheet_of(problems, dense, quantized).save(sheet)
    placement = Placement(device, torch.bfloat16, None, offload=False)
    console.print(f"\n4-bit: {describe_transformer(transformer, placement)}, on {device}\n")
    console.print(table(problems, dense, quantized, (weights_size(source), weights_size(checkpoint))))
    console.print(f"\nThe pictures side by side: {sheet}")


if __name__ == "__main__":
    main()
