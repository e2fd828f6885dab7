"""Time and memory of quantizing a transformer of FLUX.1-Depth-dev's dimensions, by stage, with and without data.

    python benchmarks/quantizer.py --device cuda --estimate
    python benchmarks/quantizer.py --device cuda --full
    python benchmarks/quantizer.py --hidden 512 --samples 1 --estimate --dry-run

`--estimate` quantizes each distinct linear of the plan `--runs` times, takes the median and multiplies by how often it
occurs; `--full` quantizes all linears of all blocks. Calibration gathers moments of `--samples` samples, each an image
of 1024 x 1024 with 512 text tokens; an estimate times 4 of them. Weights and inputs are synthetic, of true size, with
outlier channels, and made on the device; making them, reading and writing files and running the 16-bit model are not
counted. Appends one record a variant and distinct linear, and one a variant for all, to results/<device>.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from error import output
from tonfa.bench.protocol import Timing, append, record, results_file
from tonfa.models.flux.plan import FluxDims, flux_plan
from tonfa.plan import LinearPlan
from tonfa.quantizer import calibrated, recipe, split
from tonfa.quantizer.lowrank import COLD_ITERATIONS, OVERSAMPLING, WARM_ITERATIONS
from tonfa.quantizer.modulation import quantize_modulation
from tonfa.quantizer.moments import InputMoments
from tonfa.quantizer.recipe import Recipe, find_smoothing, quantize_linear
from tonfa.weights import SVDQWeights

IMAGE_TOKENS, TEXT_TOKENS = 4096, 512
TIMED_SAMPLES = 4
HELD_OUT_TOKENS = 2048
VARIANTS: dict[str, Recipe | None] = {
    "tonfa data-free": None,
    "tonfa calibrated for int4": Recipe(),
    "tonfa calibrated for fp8": Recipe(activations="fp8"),
}
STAGES = {
    "svd": (split, "low_rank"),
    "rounding": (recipe, "quantize_residual"),
    "hessian": (recipe, "smoothed_hessian"),
    "scales": (calibrated, "search_scales"),
    "gptq": (calibrated, "gptq"),
    "descent": (calibrated, "refine"),
    "refits": (calibrated, "whitened_low_rank"),
}
"""Of `quantize_linear`, by the function that is timed; `moments`, `smoothing` and `rest` come on top."""


@dataclass(frozen=True)
class Case:
    """What decides how long a linear takes."""

    kind: str
    n: int
    k: int
    unsigned: bool
    tokens: int  # a sample
    sharing: tuple[int, ...] = ()  # rows of others that are smoothed with it
    follows: bool = False  # smoothing and moments are another's

    def __str__(self) -> str:
        role = " shares" if self.follows else " shared" if self.sharing else ""
        return f"{self.kind} {self.n}x{self.k}{' unsigned' if self.unsigned else ''}{role}, {self.tokens} tokens"


def cases(hidden: int, doubles: int, singles: int) -> list[Case]:
    """Every linear of FLUX, in order."""
    linears = list(flux_plan(FluxDims(hidden, doubles, singles, True)).linears())
    return [case_of(linear, linears) for linear in linears]


def case_of(linear: LinearPlan, linears: list[LinearPlan]) -> Case:
    n, k = linear.out_features, linear.in_features
    if linear.kind == "w4a16":
        return Case("w4a16", n, k, False, 1)
    text = "add_" in linear.name or "context" in linear.name
    single = linear.name.startswith("single")
    tokens = IMAGE_TOKENS + TEXT_TOKENS if single else TEXT_TOKENS if text else IMAGE_TOKENS
    sharing = tuple(other.out_features for other in linears if other.shares_input == linear.name)
    return Case("svdq", n, k, linear.unsigned, tokens, sharing, linear.shares_input is not None)


@dataclass
class Clock:
    """Seconds by stage; a stage waits for the GPU before and after."""

    device: torch.device
    seconds: Counter[str] = field(default_factory=Counter)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = self.now()
        yield
        self.seconds[name] += self.now() - started

    @contextmanager
    def watching(self) -> Iterator[None]:
        """With the functions of STAGES timed."""
        kept = {name: getattr(module, attribute) for name, (module, attribute) in STAGES.items()}
        for name, (module, attribute) in STAGES.items():
            setattr(module, attribute, self._timed(name, kept[name]))
        try:
            yield
        finally:
            for name, (module, attribute) in STAGES.items():
                setattr(module, attribute, kept[name])

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            with self.stage(name):
                return function(*arguments, **options)

        return timed


class Synthetic:
    """One input's distribution and the weights that read it, on a device: as `synthetic.py`'s, cheaper to draw."""

    def __init__(self, k: int, unsigned: bool, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.unsigned, self.k, self.device = unsigned, k, device
        directions = min(256, k)
        power = torch.arange(1, directions + 1, device=device) ** -0.5
        self.mixing = self.normal(directions, k) * (power / power.norm()).unsqueeze(1)
        self.scales = (0.5 * self.normal(k)).exp()
        massive = torch.randperm(k, generator=self.generator, device=device)[:8]
        self.scales[massive] *= 8 + 17 * torch.rand(8, generator=self.generator, device=device)
        self.shifts = 0.5 * self.normal(k) - 0.7 if unsigned else 0.3 * self.normal(k)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def tokens(self, count: int) -> Tensor:
        """(count, K) bfloat16."""
        x = self.normal(count, len(self.mixing)) @ self.mixing + 0.5 * self.normal(count, self.k)
        if self.unsigned:
            return functional.gelu((x + self.shifts) * self.scales, approximate="tanh").bfloat16()
        return ((x + self.shifts) * self.scales).bfloat16()

    def weight(self, n: int) -> Tensor:
        """(N, K) bfloat16: heavy tails, low-rank directions, columns that shrink where the input is large."""
        chi2 = sum(self.normal(n, self.k).square() for _ in range(5))
        weight = self.normal(n, self.k) / (chi2 / 3).sqrt()
        strength = 0.8 * torch.arange(1, 97, device=self.device) ** -0.8
        weight += (self.normal(n, 96) * strength) @ self.normal(96, self.k)
        weight *= (0.3 * self.normal(n, 1)).exp() / self.scales.sqrt()
        return (weight * (n**0.5 / weight.norm())).bfloat16()


@dataclass(frozen=True)
class Run:
    """One linear, quantized once."""

    seconds: dict[str, float]
    error: float | None

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def gather(case: Case, data: Synthetic, samples: int, timed: int, clock: Clock) -> InputMoments:
    """Moments of `timed` samples; their seconds count for `samples`."""
    moments = InputMoments.empty(str(case), case.k, device=data.device)
    batches = [data.tokens(case.tokens) for _ in range(min(timed, TIMED_SAMPLES))]
    moments.add(batches[0][:1])
    with clock.stage("moments"):
        for i in range(timed):
            moments.add(batches[i % len(batches)])
    clock.seconds["moments"] *= samples / timed
    return moments


def quantize(case: Case, made: Recipe | None, rank: int, samples: int, timed: int, data: Synthetic) -> Run:
    """By stage; the data are made before the clock runs."""
    clock = Clock(data.device)
    weight, bias = data.weight(case.n), 0.1 * data.normal(case.n).bfloat16()
    if case.kind == "w4a16":
        with clock.stage("modulation"):
            quantize_modulation(weight, bias)
        return Run(dict(clock.seconds), None)
    chosen = replace(made or Recipe(), rank=rank)
    moments = smooth = None
    if made is not None:
        moments = gather(case, data, samples, timed, clock)
        together = [weight, *(data.weight(n) for n in case.sharing)]
        with clock.stage("smoothing"):
            smooth = find_smoothing(together, moments, chosen, unsigned=case.unsigned)
        del together
        if case.follows:
            clock.seconds.clear()
    started = clock.now()
    before = sum(clock.seconds.values())
    with clock.watching():
        weights = quantize_linear(
            weight, bias, chosen, moments=moments, smooth_factor=smooth, unsigned=case.unsigned, name=str(case)
        )
    clock.seconds["rest"] = clock.now() - started - (sum(clock.seconds.values()) - before)
    return Run(dict(clock.seconds), held_out(weights, weight, bias, chosen, data))


def held_out(weights: SVDQWeights, weight: Tensor, bias: Tensor, made: Recipe, data: Synthetic) -> float:
    """Relative output error on tokens that were not seen."""
    x = data.tokens(HELD_OUT_TOKENS)
    exact = functional.linear(x.float(), weight.float())
    return float((output(weights, x, made.activations) - bias.float() - exact).norm() / exact.norm())


def work(case: Case, made: Recipe | None, rank: int, samples: int) -> dict[str, float]:
    """TFLOP by arithmetic: the products and factorizations of one linear."""
    if case.kind == "w4a16":
        return {}
    n, k, width = case.n, case.k, rank + OVERSAMPLING

    def decompositions(cold: int, warm: int, rows: int) -> float:
        passes = cold * (2 * COLD_ITERATIONS + 2) + warm * (2 * WARM_ITERATIONS + 2)
        return 2.0 * rows * k * width * passes

    alternations = Recipe().iterations
    single = decompositions(1, alternations, n) + (1 + alternations) * 2.0 * n * k * rank
    if made is None:
        return {"fp32": single / 1e12}
    rounds, sweeps = calibrated.ROUNDS, calibrated.SWEEPS
    refits = rounds + sweeps
    single += rounds * n * k**2 + sweeps * 2.0 * n * k**2  # feedback of GPTQ, gradients of descent
    single += refits * 2.0 * n * k**2 + decompositions(1, refits - 1, n)  # whitening and refits
    single += (refits + 1) * 2.0 * n * k**2 + refits * 2.0 * n * k * rank  # errors under the Hessian, branches
    single += k**3  # the inverse factor
    double = k**3 / 3
    bf16 = 0.0
    if not case.follows:
        single += decompositions(3, 0, n + sum(case.sharing))
        double += k**3 / 3
        bf16 = 2.0 * samples * case.tokens * k**2
    return {"fp32": single / 1e12, "fp64": double / 1e12, "bf16": bf16 / 1e12}


def measured(
    case: Case, made: Recipe | None, options: argparse.Namespace, count: int, seed: int
) -> tuple[list[Run], float]:
    """Some runs on different data, and the peak of the device's memory in GiB."""
    cuda = options.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
    timed = options.samples if options.full else min(TIMED_SAMPLES, options.samples)
    runs = []
    for i in range(count):
        data = Synthetic(case.k, case.unsigned, seed + i, options.device)
        runs.append(quantize(case, made, options.rank, options.samples, timed, data))
    return runs, torch.cuda.max_memory_allocated(options.device) / 2**30 if cuda else 0.0


def medians(runs: list[Run]) -> dict[str, float]:
    """By stage."""
    return {name: Timing.of([run.seconds[name] for run in runs]).median for name in runs[0].seconds}


def line(
    options: argparse.Namespace,
    variant: str,
    case: dict[str, Any],
    timing: Timing,
    stages: dict[str, float],
    tflop: dict[str, float],
    peak: float,
    **settings: Any,
) -> dict[str, Any]:
    kept = {"samples": 0 if VARIANTS[variant] is None else options.samples, "rank": options.rank, **settings}
    kept["tflop"] = {name: round(value, 3) for name, value in tflop.items()}
    memory = {"peak": peak} if options.device.type == "cuda" else {}
    parts = {name: {"value": float(f"{seconds:.4g}")} for name, seconds in stages.items()}
    return record("quantize", case, variant, kept, timing, options.device, memory_gib=memory, parts=parts, unit="s")


def show(name: str, count: int, seconds: float, stages: dict[str, float], peak: float, error: float | None) -> None:
    parts = "  ".join(f"{stage} {value:.3f}" for stage, value in stages.items())
    quality = "" if error is None else f"  error {error:.4f}"
    print(f"  {count:4d} x {name:48s} {seconds:8.3f} s  {peak:5.2f} GiB{quality}  {parts}", flush=True)


def whole(options: argparse.Namespace, variant: str) -> tuple[list[dict[str, Any]], float]:
    """Records of one variant: each distinct linear, and all together. Returns them and the total in seconds."""
    made = VARIANTS[variant]
    every = cases(options.hidden, options.double_blocks, options.single_blocks)
    sums: Counter[str] = Counter()
    tflop: Counter[str] = Counter()
    total = most = 0.0
    lines = []
    dims = {"hidden": options.hidden, "layers": [options.double_blocks, options.single_blocks]}
    for number, (case, occurrences) in enumerate(Counter(every).items()):
        count = occurrences if options.full else options.runs
        runs, peak = measured(case, made, options, count, 1000 * number)
        stages, timing = medians(runs), Timing.of([run.total for run in runs])
        errors = [run.error for run in runs if run.error is not None]
        error = Timing.of(errors).median if errors else None
        show(str(case), occurrences, timing.median, stages, peak, error)
        scale = 1 if options.full else occurrences / len(runs)
        for run in runs:
            sums.update({name: seconds * scale for name, seconds in run.seconds.items()})
        total += sum(run.total for run in runs) * scale
        amount = work(case, made, options.rank, options.samples)
        tflop.update({name: value * occurrences for name, value in amount.items()})
        most = max(most, peak)
        shape = {"kind": case.kind, "n": case.n, "k": case.k, "unsigned": case.unsigned, "tokens": case.tokens}
        shape |= {"follows": case.follows, "count": occurrences}
        known = {} if error is None else {"held_out_error": round(error, 5)}
        lines.append(line(options, variant, shape, timing, stages, amount, peak, **known))
    name = "all linears" if options.full else "all linears, estimated"
    timing = Timing(total, total, total, 1)
    lines.append(line(options, variant, {**dims, "linears": name}, timing, dict(sums), dict(tflop), most))
    return lines, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--estimate", action="store_true", help="each distinct linear, times how often it occurs")
    mode.add_argument("--full", action="store_true", help="every linear")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--double-blocks", type=int, default=19)
    parser.add_argument("--single-blocks", type=int, default=38)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--runs", type=int, default=2, help="of an estimate, for each distinct linear")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--results", type=Path, help="file to append to (default: results/<device>.jsonl)")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    target = options.results or results_file(options.device)
    small = Case("svdq", 640, 640, False, 640)  # compiles kernels and wakes libraries
    quantize(small, Recipe(), options.rank, 1, 1, Synthetic(small.k, False, 0, options.device))
    for variant in options.variants:
        print(f"{variant}:", flush=True)
        lines, total = whole(options, variant)
        what = "measured" if options.full else "estimated"
        sums = "  ".join(f"{name} {part['value']}" for name, part in lines[-1]["parts"].items())
        print(f"  all linears, {what}: {total:.1f} s  {sums}  TFLOP {lines[-1]['settings']['tflop']}", flush=True)
        if not options.dry_run:
            for entry in lines:
                append(target, entry)


if __name__ == "__main__":
    main()
