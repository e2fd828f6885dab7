"""What a block-Hadamard rotation of the smoothed input would gain and cost; docs/method.md says what came of it.

    python benchmarks/rotation.py --size 768 --seeds 0 1
    python benchmarks/rotation.py --cost                       on a CUDA GPU

With R = diag(H, H, ...), H the orthonormal Hadamard matrix of 64 or 128, and D = diag(smooth),

    W x = (W D R) (R^T D^-1 x)

is exact. What the recipe `tonfa` quantizes is then the rotated weight and the rotated input, whose channels are sums
over a block: outliers that one token alone has are spread, and groups become even. No rotation keeps a GELU's output
nonnegative, so its codes have a sign; the mean error goes to the bias with and without a rotation.

R has to be computed at run time behind a GELU, and behind a norm's modulation, which multiplies each channel of each
sample by another number. Attention is linear in v and keeps heads apart: there, a rotation within a head goes into the
rows of v's projection, if the smoothing factors go there too, and then image and text have to share them.

`rms` smooths by square roots of RMS spans instead of learned factors, which are learned for inputs without a rotation.
`--cost` times the quantizer of FLUX's inputs alone and with torch's product of each block by H in front of it, an upper
bound: a kernel that rotates what it holds in registers moves no byte more. Such a kernel's floor is printed beside it.

Appends one record a kind, rotation and kind of activations, and one for the geometric means over all structured kinds
and over those with a sign; with `--cost` one a shape and quantizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from error import CALIBRATION_TOKENS, HELD_OUT_TOKENS, PRODUCTS, geometric_mean, output
from synthetic import KINDS, STRUCTURED, Kind, Layer, make_layer
from tonfa.bench.protocol import append, error_record, interleaved, record, results_file
from tonfa.ops.activation import Activations
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.recipe import RECIPES, Recipe, find_smoothing, quantize_linear
from tonfa.quantizer.smoothing import smoothing, spans

Smoothing = Literal["learned", "rms"]
BF16_TFLOPS = 782
"""The fastest bf16 product of FLUX's shapes that was measured on an H200."""
COSTS = ((4608, 3072), (4608, 12288))


@dataclass(frozen=True)
class Variant:
    """A block size, 0 for no rotation, and how smoothing factors are found."""

    block: int
    smoothing: Smoothing = "learned"

    @property
    def name(self) -> str:
        return f"rotation-{self.block or 'none'}" + ("-rms" if self.smoothing == "rms" else "")


NONE = Variant(0)
VARIANTS = (NONE, Variant(64), Variant(128), Variant(128, "rms"))


def hadamard(size: int) -> Tensor:
    """(size, size) float32, orthonormal and symmetric; size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], dim=1), torch.cat([matrix, -matrix], dim=1)])
    return matrix / size**0.5


def rotated(x: Tensor, matrix: Tensor) -> Tensor:
    """(..., K) with each block of len(matrix) channels multiplied by it."""
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


@dataclass(frozen=True)
class Problem:
    """A layer, the tokens that calibrate it, and those that its error is measured on."""

    layer: Layer
    calibration: Tensor  # (T, K) bfloat16
    moments: InputMoments
    held_out: Tensor  # (T, K) bfloat16

    @classmethod
    def of(cls, layer: Layer, seed: int, device: torch.device) -> Problem:
        """The tokens of error.py."""
        moved = replace(layer, weight=layer.weight.to(device), bias=layer.bias.to(device))
        calibration = layer.tokens(CALIBRATION_TOKENS, 10 * seed + 1).to(device)
        moments = InputMoments.empty(layer.kind, calibration.shape[1], device=device)
        moments.add(calibration)
        return cls(moved, calibration, moments, layer.tokens(HELD_OUT_TOKENS, 10 * seed + 2).to(device))


def factors(problem: Problem, variant: Variant, recipe: Recipe, unsigned: bool) -> Tensor:
    """Smoothing factors (K,) bfloat16."""
    weights = [problem.layer.weight]
    if variant.smoothing == "learned":
        return find_smoothing(weights, problem.moments, recipe, unsigned=unsigned)
    return smoothing(*spans(weights, problem.moments, "rms"), 0.5, 0.5, torch.bfloat16)


def held_out_error(problem: Problem, variant: Variant, rank: int, activations: Activations) -> float:
    """Relative error of the output without its bias on the tokens held out."""
    layer, recipe = problem.layer, replace(RECIPES["tonfa"], rank=rank, activations=activations)
    found = plain(problem, variant, recipe) if not variant.block else with_rotation(problem, variant, recipe)
    exact = problem.held_out.float() @ layer.weight.T
    return float((found - exact).norm() / exact.norm())


def plain(problem: Problem, variant: Variant, recipe: Recipe) -> Tensor:
    """The output (T, N) of what the product makes, without its bias."""
    layer = problem.layer
    smooth = factors(problem, variant, recipe, layer.unsigned)
    weights = quantize_linear(
        layer.weight,
        layer.bias,
        recipe,
        moments=problem.moments,
        smooth_factor=smooth,
        unsigned=layer.unsigned,
        dtype=torch.bfloat16,
    )
    return output(weights, problem.held_out, recipe.activations) - layer.bias


def with_rotation(problem: Problem, variant: Variant, recipe: Recipe) -> Tensor:
    """The same of the layer that reads R^T diag(1/smooth) x, which is quantized without more smoothing."""
    layer, smooth = problem.layer, factors(problem, variant, recipe, unsigned=False).float()
    matrix = hadamard(variant.block).to(smooth.device)
    weight = rotated(layer.weight * smooth, matrix)
    tokens = rotated(problem.calibration.float() / smooth, matrix)
    # As where quantize_linear is told of a GELU: errors around the mean are solved for, and the bias takes up the mean.
    mean = tokens.mean(dim=0) if layer.unsigned else torch.zeros_like(smooth)
    moments = InputMoments.empty(layer.kind, len(smooth), device=smooth.device, dtype=torch.float32)
    moments.add(tokens - mean)
    ones = torch.ones_like(smooth)
    weights = quantize_linear(
        weight, layer.bias, recipe, moments=moments, smooth_factor=ones, dtype=torch.bfloat16, name=layer.kind
    )
    y = output(weights, rotated(problem.held_out.float() / smooth, matrix), recipe.activations)
    return (y + (weight - weights.dense()[0]) @ mean).bfloat16().float() - layer.bias


Errors = dict[tuple[Variant, Activations], float]


def errors(arguments: argparse.Namespace, seed: int) -> dict[str, Errors]:
    """By kind, with the geometric means."""
    by_kind: dict[str, Errors] = {}
    for kind in arguments.kinds:
        problem = Problem.of(make_layer(kind, arguments.size, seed), seed, arguments.device)
        by_kind[kind] = {
            (variant, activations): held_out_error(problem, variant, arguments.rank, activations)
            for activations in PRODUCTS
            for variant in VARIANTS
        }
        print(f"  seed {seed}: {kind} done", flush=True)
    means = {"geomean": set(STRUCTURED), "geomean-signed": set(STRUCTURED) - {"gelu"}}
    found = dict(by_kind)
    for name, members in means.items():
        if members <= set(by_kind):
            keys = next(iter(by_kind.values()))
            found[name] = {key: geometric_mean(by_kind[kind][key] for kind in members) for key in keys}
    return found


def measure_errors(arguments: argparse.Namespace) -> None:
    for seed in arguments.seeds:
        by_kind = errors(arguments, seed)
        print(f"\nsize {arguments.size}, rank {arguments.rank}, seed {seed}: relative error, of that without rotation")
        print(f"{'':24s}" + "".join(f"{kind:>18s}" for kind in by_kind))
        for key in next(iter(by_kind.values())):
            variant, activations = key
            cells = [f"{f[key]:10.4f} ({f[key] / f[NONE, activations]:.3f})" for f in by_kind.values()]
            print(f"{variant.name:18s} {activations:5s}" + "".join(f"{cell:>18s}" for cell in cells))
        for kind, found in by_kind.items():
            for (variant, activations), value in found.items():
                case = {"kind": kind, "size": arguments.size, "rank": arguments.rank, "activations": activations}
                settings = {
                    "recipe": "tonfa",
                    "rotation": variant.block,
                    "smoothing": variant.smoothing,
                    "calibration_tokens": CALIBRATION_TOKENS,
                    "held_out_tokens": HELD_OUT_TOKENS,
                }
                known = {NONE.name: found[NONE, activations]}
                line = error_record({**case, "seed": seed}, variant.name, settings, value, known, arguments.device)
                if not arguments.dry_run:
                    append(arguments.results or results_file(arguments.device), line)


def quantizers(rows: int, channels: int) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """Those that take (rows, channels) bf16 to FP8."""
    from kernels import RANK, random_input
    from tonfa.kernels.hopper import inputs, quantize
    from tonfa.kernels.triton.quantize import pack_input
    from tonfa.kernels.triton.quantize import quantize as triton_quantize

    w = random_input(channels, RANK, "fp8")
    yield "triton", partial(triton_quantize, w=pack_input(w))
    if torch.cuda.get_device_capability()[0] == 9 and channels <= inputs.LARGEST_CHANNELS:
        yield "hopper", partial(quantize.quantize, w=inputs.pack_input(w))


def measure_costs(arguments: argparse.Namespace) -> None:
    """Needs a CUDA GPU with Triton."""
    from kernels import captured, outlier_input, per_call

    device, block = torch.device("cuda"), 128
    matrix = hadamard(block).to(device, torch.bfloat16)
    for rows, channels in COSTS:
        inputs = [outlier_input(rows, channels).unsqueeze(0) for _ in range(3)]
        flop = 2.0 * rows * channels * block
        floor = flop / BF16_TFLOPS / 1e9
        for name, quantizer in quantizers(rows, channels):
            candidates = {
                "rotate-quantize": [partial(lambda q, x: q(rotated(x, matrix)), quantizer, x) for x in inputs],
                "quantize": [partial(quantizer, x) for x in inputs],
                "rotate": [partial(rotated, x, matrix) for x in inputs],
            }
            timings = interleaved({n: [captured(calls)] for n, calls in candidates.items()}, 20, device)
            timings = {n: per_call(timing) for n, timing in timings.items()}
            text = "  ".join(f"{n} {t.median * 1e3:.1f} us" for n, t in timings.items())
            print(f"{rows} x {channels} {name}: {text}  floor of a fused rotation {floor * 1e3:.1f} us", flush=True)
            own = timings.pop("rotate-quantize")
            settings = {"activations": "fp8", "backend": name, "rotation": block}
            case = {"op": "rotate-quantize", "m": rows, "k": channels}
            least = {"value": floor, "why": f"{flop / 1e9:.2f} GFLOP more than the quantizer at {BF16_TFLOPS} TFLOP/s"}
            line = record("kernels", case, "rotate-quantize", settings, own, device, timings, floor=least)
            if not arguments.dry_run:
                append(arguments.results or results_file(device), line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", action="store_true", help="time the quantizers instead; needs a CUDA GPU")
    parser.add_argument("--size", type=int, default=768, help="in and out channels")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=get_args(Kind))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="of the errors")
    parser.add_argument("--results", type=Path, help="file to append to (default: results/<device>.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    arguments = parser.parse_args()
    if arguments.cost:
        torch.manual_seed(0)
        with torch.inference_mode():
            measure_costs(arguments)
        return
    measure_errors(arguments)


if __name__ == "__main__":
    main()
