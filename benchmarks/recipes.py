"""Teacher-forced velocity error of every way to quantize a FLUX pipeline's transformer, beside its 16-bit one.

    python benchmarks/outliers.py --model demo/model --out out/demo-outliers
    python benchmarks/recipes.py --model out/demo-outliers --prompts demo/inputs/prompts.json \\
        --candidate svdquant=out/svdquant --candidate tonfa=out/tonfa

Computes the brackets of `brackets.py`, the recipes without calibration data, and what float32 instead of bf16 changes;
checkpoints that were calibrated before are given as `--candidate NAME=FOLDER`. Appends one record each to
results/<device>.jsonl. Ratios are to `rtn` and, where they are among the candidates, `svdquant` and `svdquant-gptq`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from brackets import BRACKETS, apply_bracket
from tonfa.bench.protocol import append, error_record, results_file
from tonfa.evaluate.compare import Evaluation, Velocity
from tonfa.evaluate.drawing import Settings
from tonfa.evaluate.problems import read_problems
from tonfa.evaluate.statistics import ratio_interval
from tonfa.models.flux.guidance import choose_guidance
from tonfa.models.flux.transformer import SVDQFluxTransformer2DModel
from tonfa.ops.activation import Activations
from tonfa.quantizer.recipe import RECIPES

DATA_FREE = {"svdquant-data-free": RECIPES["svdquant"], "tonfa-data-free": RECIPES["tonfa"]}
NOISE = "float32"
BASELINES = ("rtn", "svdquant", "svdquant-gptq")


class InFloat32(nn.Module):
    """The 16-bit weights in float32 arithmetic: the error that 16-bit arithmetic makes by itself."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer.float()

    def forward(self, **inputs: Any) -> Any:
        wide = {n: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in inputs.items()}
        return self.transformer(**wide)


def candidates(arguments: argparse.Namespace, load: Callable[[], Any]) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Names, and what makes the transformer; `load` reads the 16-bit one anew."""
    device, activations = arguments.device, arguments.activations
    yield NOISE, lambda: InFloat32(load())
    for name in BRACKETS:
        yield name, lambda name=name: apply_bracket(name, load(), activations)
    for name, recipe in DATA_FREE.items():
        chosen = replace(recipe, rank=arguments.rank)
        yield name, lambda r=chosen: SVDQFluxTransformer2DModel.from_dense(load(), r, activations=activations)
    for text in arguments.candidate:
        name, _, folder = text.partition("=")
        options = {"device": device, "dtype": torch.bfloat16, "activations": activations}
        yield name, partial(SVDQFluxTransformer2DModel.from_pretrained, folder, **options)


def activations_of(name: str, asked: str) -> str:
    return {NOISE: "none", "nf4-weight-only": "none", "int8-w8a8": "int8"}.get(name, asked)


def measure(arguments: argparse.Namespace) -> dict[str, Velocity]:
    """Velocity errors by candidate, in the order in which they are made."""
    from diffusers import FluxControlPipeline, FluxPipeline, FluxTransformer2DModel

    def load() -> Any:
        folder = arguments.model / "transformer"
        return FluxTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16).to(arguments.device)

    transformer = load()
    control = transformer.config.in_channels != transformer.out_channels
    kind = FluxControlPipeline if control else FluxPipeline
    pipe = kind.from_pretrained(arguments.model, transformer=transformer, dtype=torch.bfloat16).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    problems = read_problems(arguments.prompts, samples=arguments.samples, seed=arguments.seed)
    guidance = choose_guidance(None, control)
    side = arguments.size
    settings = Settings(side, side, arguments.steps, guidance, arguments.text_tokens, arguments.batch)
    evaluation = Evaluation(pipe, problems, settings, seed=arguments.seed, keep_inputs=False)
    found = {}
    for name, make in candidates(arguments, load):
        started = time.perf_counter()
        found[name] = velocity = evaluation.velocity(make())
        bounds = "" if velocity.low is None else f" [{velocity.low:.5f}, {velocity.high:.5f}]"
        print(f"{name:24s} {velocity.overall:.5f}{bounds}   {time.perf_counter() - started:.1f} s", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"), help="folder of a 16-bit FLUX pipeline")
    parser.add_argument("--prompts", type=Path, default=Path("demo/inputs/prompts.json"))
    parser.add_argument("--candidate", action="append", default=[], metavar="NAME=FOLDER", help="4-bit checkpoint")
    parser.add_argument("--samples", type=int, help="pictures (default: one a prompt)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--activations", default="int4", choices=get_args(Activations))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--results", type=Path, help="file to append to (default: results/<device>.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    for text in arguments.candidate:
        name, separator, folder = text.partition("=")
        if not name or not separator or not Path(folder).exists():
            parser.error(f"--candidate {text}: expected NAME=FOLDER of a checkpoint that exists")
    found = measure(arguments)
    print(f"\n{'':24s}  error" + "".join(f"  / {name}" for name in BASELINES if name in found))
    for name, velocity in found.items():
        ratios = (f"{velocity.overall / found[b].overall:>{len(b) + 4}.3f}" for b in BASELINES if b in found)
        print(f"{name:24s} {velocity.overall:.4f}" + "".join(ratios))
    if arguments.dry_run:
        return
    target = arguments.results or results_file(arguments.device)
    samples = arguments.samples or len(read_problems(arguments.prompts))
    for name, velocity in found.items():
        case = {
            "kind": "velocity",
            "model": arguments.model.name if arguments.model.is_absolute() else str(arguments.model),
            "size": [arguments.size, arguments.size],
            "steps": arguments.steps,
            "samples": samples,
            "text_tokens": arguments.text_tokens,
            "rank": arguments.rank,
            "activations": activations_of(name, arguments.activations),
            "seed": arguments.seed,
        }
        known = {b: found[b].overall for b in BASELINES if b in found}
        settings = {
            "interval": [velocity.low, velocity.high],
            "ratio_intervals": {b: ratio_interval(velocity.by_picture, found[b].by_picture, 0) for b in known},
            "by_timestep": velocity.by_timestep,
        }
        append(target, error_record(case, name, settings, velocity.overall, known, arguments.device))


if __name__ == "__main__":
    main()
