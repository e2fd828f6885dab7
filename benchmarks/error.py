"""Held-out relative output error of every recipe on synthetic layers, for 4-bit and for FP8 activations.

    python benchmarks/error.py --size 512 --seeds 0 1
    python benchmarks/error.py --size 1536 --kinds adaln gelu --dry-run

||Y - Y_quantized|| / ||Y|| over 4096 tokens of which no recipe has seen one; 8192 others calibrate. The quantized layer
is computed by the ops' references, so activations are quantized as the engine does. Prints a table and appends one
record a kind, recipe and kind of activations to results/<device>.jsonl, and one for the geometric means.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from brackets import rounded_input, rounded_weight
from synthetic import KINDS, STRUCTURED, Kind, Layer, make_layer
from tonfa.bench.protocol import append, error_record, results_file
from tonfa.ops import product, quantize
from tonfa.ops.activation import Activations, InputWeights
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.recipe import RECIPES, Recipe, quantize_linear
from tonfa.weights import SVDQWeights

CALIBRATION_TOKENS = 8192
HELD_OUT_TOKENS = 4096
CALIBRATED: dict[str, Recipe] = {
    "svdquant": RECIPES["svdquant"],
    "svdquant-gptq": RECIPES["svdquant-gptq"],
    "tonfa": RECIPES["tonfa"],
    "tonfa-fp8": replace(RECIPES["tonfa"], activations="fp8"),
}
DATA_FREE: dict[str, Recipe] = {
    "svdquant-data-free": RECIPES["svdquant"],
    "tonfa-data-free": RECIPES["tonfa"],
    "tonfa-data-free-columns": replace(RECIPES["tonfa"], column_power=0.5),
}
PAPER, PAPER_DATA_FREE = "svdquant", "svdquant-data-free"
PRODUCTS: tuple[Activations, ...] = ("int4", "fp8")


def output(weights: SVDQWeights, x: Tensor, activations: Activations) -> Tensor:
    """What the engine computes."""
    found = weights if activations == "int4" else weights.unshifted()
    read = InputWeights(found.smooth_factor, found.proj_down, found.unsigned, activations)
    return product.reference(quantize.reference(x, read), found, activations).float()


def errors(layer: Layer, rank: int, seed: int, device: torch.device) -> dict[tuple[str, Activations], float]:
    """By recipe and kind of activations; "none" and "int8" for what does not depend on it."""
    x, weight, bias = (t.to(device) for t in (layer.tokens(HELD_OUT_TOKENS, 10 * seed + 2), layer.weight, layer.bias))
    exact = x.float() @ weight.T
    moments = InputMoments.empty(layer.kind, weight.shape[1], device=device)
    moments.add(layer.tokens(CALIBRATION_TOKENS, 10 * seed + 1).to(device))

    def relative(found: Tensor) -> float:
        return float((found - exact).norm() / exact.norm())

    found: dict[tuple[str, Activations], float] = {}
    for name, activations in (("rtn", "int4"), ("rtn", "fp8"), ("nf4-weight-only", "none"), ("int8-w8a8", "int8")):
        y = rounded_input(name, x, activations, layer.unsigned) @ rounded_weight(name, weight, activations).T
        found[name, activations] = relative(y)
    for name, recipe in {**CALIBRATED, **DATA_FREE}.items():
        started = time.perf_counter()
        known = moments if name in CALIBRATED else None
        weights = quantize_linear(
            weight,
            bias,
            replace(recipe, rank=rank),
            moments=known,
            unsigned=layer.unsigned,
            dtype=torch.bfloat16,
            name=layer.kind,
        )
        seconds = time.perf_counter() - started
        for activations in PRODUCTS if recipe.activations == "int4" else (recipe.activations,):
            found[name, activations] = relative(output(weights, x, activations) - bias)
        print(f"  {layer.kind} {name}: {seconds:.1f} s", flush=True)
    return found


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def baselines(found: dict[tuple[str, Activations], float], name: str, activations: Activations) -> dict[str, float]:
    """The paper's method with 4-bit activations, with the same activations, and without data for what had none."""
    same = activations if activations in PRODUCTS else "int4"
    result = {"svdquant": found[PAPER, "int4"], "svdquant-same-activations": found[PAPER, same]}
    if name in DATA_FREE:
        result[PAPER_DATA_FREE] = found[PAPER_DATA_FREE, same]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="in and out channels")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=get_args(Kind))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--results", type=Path, help="file to append to (default: results/<device>.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    target = arguments.results or results_file(arguments.device)
    for seed in arguments.seeds:
        by_kind: dict[str, dict[tuple[str, Activations], float]] = {}
        for kind in arguments.kinds:
            layer = make_layer(kind, arguments.size, seed)
            by_kind[kind] = errors(layer, arguments.rank, seed, arguments.device)
        structured = [kind for kind in by_kind if kind in STRUCTURED]
        if structured:
            keys = by_kind[structured[0]]
            by_kind["geomean"] = {key: geometric_mean(by_kind[kind][key] for kind in structured) for key in keys}
        show(by_kind, arguments.size, arguments.rank, seed)
        if arguments.dry_run:
            continue
        for kind, found in by_kind.items():
            for (name, activations), value in found.items():
                case = {"kind": kind, "size": arguments.size, "rank": arguments.rank, "activations": activations}
                settings = {"calibration_tokens": CALIBRATION_TOKENS, "held_out_tokens": HELD_OUT_TOKENS}
                known = baselines(found, name, activations)
                line = error_record({**case, "seed": seed}, name, settings, value, known, arguments.device)
                append(target, line)


def show(by_kind: dict[str, dict[tuple[str, Activations], float]], size: int, rank: int, seed: int) -> None:
    """Errors by kind, then the geometric mean over the structured kinds and its ratios."""
    print(f"\nsize {size}, rank {rank}, seed {seed}: relative output error; geomean of the structured kinds")
    print(
        f"{'recipe':25s} {'acts':5s}" + "".join(f"{kind:>11s}" for kind in by_kind) + "   vs paper  same acts  no data"
    )
    first = next(iter(by_kind.values()))
    mean = by_kind.get("geomean", first)
    for name, activations in first:
        line = f"{name:25s} {activations:5s}" + "".join(f"{f[name, activations]:11.4f}" for f in by_kind.values())
        ratios = [mean[name, activations] / b for b in baselines(mean, name, activations).values()]
        print(line + "  " + "".join(f"{ratio:9.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
