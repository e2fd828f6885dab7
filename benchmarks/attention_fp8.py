"""FP8 attention: is it right, what does it cost, and what do pictures lose? For a Hopper GPU or newer.

    python benchmarks/attention_fp8.py
    python benchmarks/attention_fp8.py --device cpu        the errors alone, by the specification
    python benchmarks/attention_fp8.py --diagnose          which graphs cuDNN builds, and its reasons against the others

Prints the errors of 16-bit attention, of the FP8 kernels and of their specification, each against float32; the
microseconds of each kernel, called one by one and in one CUDA graph; how far FP8 attention moves the demo model's
velocities, beside its 4-bit weights and other choices of scales, and how far its pictures. Ends with a nonzero status
if the kernels are wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from attention_fp8_plans import diagnose, with_log
from tonfa.dispatch import bind_attention
from tonfa.kernels.attention import sdpa
from tonfa.layers.attention import Attention
from tonfa.ops import attention, attention_fp8

ROOT = Path(__file__).resolve().parent.parent
FLUX = (1, 24, 4608, 128)
SHAPES = (FLUX, (1, 2, 320, 128), (1, 24, 4608 + 77, 128), (2, 24, 1536, 128))
KINDS = ("gaussian", "outliers", "common", "center")
INPUTS = 3
RUNS = 60
Function = Callable[..., Any]


@dataclass(frozen=True)
class Problem:
    """What attention is given."""

    q: Tensor  # (B, H, L, D) bf16, RMS-normed, as k
    k: Tensor
    v: Tensor
    norm_q: list[Tensor]  # (D,) each
    norm_k: list[Tensor]

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def all(self) -> tuple[Any, ...]:
        return *self.heads, None, self.norm_q, self.norm_k

    def exact(self) -> Tensor:
        return attention.reference(*(x.float() for x in self.heads))

    def specified(self) -> Tensor:
        return attention_fp8.reference(*self.heads, self.norm_q, self.norm_k)


def problem(kind: str, shape: tuple[int, ...], device: torch.device, seed: int = 0) -> Problem:
    """ "outliers": large channels of k and v; "common": a vector in all keys, as large as what they differ in;
    "center": one in all values, twice as large."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator, device=device).mul_(0.8) for _ in range(3))
    norm = torch.linspace(0.5, 1.5, shape[3], device=device)
    norms = [norm, norm.clone()]
    if kind == "outliers":
        norms[1][:2] *= 8
        v[..., :3] *= 50
    if kind == "common":
        k += torch.randn(*shape[:2], 1, shape[3], generator=generator, device=device)
    if kind == "center":
        v += 2 * torch.randn(1, shape[1], 1, shape[3], generator=generator, device=device)
    for x, w in zip((q, k), norms, strict=True):
        x *= torch.rsqrt(x.square().mean(-1, keepdim=True)) * w
    in_memory = [x.transpose(1, 2).contiguous().transpose(1, 2).bfloat16() for x in (q, k, v)]
    return Problem(*in_memory, [norms[0]], [norms[1]])


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def versions(device: torch.device) -> None:
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, torch's cuDNN {torch.backends.cudnn.version()}")
    if device.type == "cuda":
        import cudnn
        import triton

        print(f"triton {triton.__version__}, frontend {cudnn.__version__}, cuDNN {cudnn.backend_version()}")
        print(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def plans(device: torch.device) -> bool:
    """Build a plan for every shape; where one fails, print what is needed to mend it."""
    import cudnn

    from tonfa.kernels.attention import cudnn_fp8
    from tonfa.kernels.attention.fp8_quantize import quantize

    good = True
    for shape in SHAPES:
        started = time.perf_counter()
        try:
            given = problem("gaussian", shape, device)
            cudnn_fp8.attend(quantize(*given.heads, given.norm_q, given.norm_k))
            torch.cuda.synchronize()
            plan = cudnn_fp8._plans[torch.Size(shape), device]
            engines = [config.engine_id for config in plan._graph.plans]
            print(f"plan {shape}: {time.perf_counter() - started:.2f} s, {plan._workspace} bytes, engines {engines}")
        except Exception:
            good = False
            print(f"plan {shape} FAILED; last error of cuDNN: {cudnn.get_last_error_string()!r}")
            traceback.print_exc(file=sys.stdout)
    return good


def errors(device: torch.device, kernel: Function | None, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Relative errors against float32; whether the kernels keep to their specification."""
    good = True
    print(f"\n{'relative error':34s} {'16-bit':>8s} {'fp8':>8s} {'spec':>8s} {'fp8-spec':>8s}")
    for shape in shapes:
        for kind in KINDS:
            given = problem(kind, shape, device)
            exact, specified = given.exact(), given.specified()
            found = specified if kernel is None else kernel(*given.all)
            apart = error(found, specified)
            row = error(sdpa.attention(*given.heads), exact), error(found, exact), error(specified, exact), apart
            good &= row[1] <= 1.2 * row[2] and apart < 0.06
            print(f"{kind:10s} {shape!s:23s} {' '.join(f'{x:8.4f}' for x in row)}")
    return good


def probability_scales(device: torch.device) -> None:
    """Whether another scale of the probabilities would be better; 448 and above may saturate."""
    from tonfa.kernels.attention import cudnn_fp8
    from tonfa.kernels.attention.fp8_dequantize import dequantize
    from tonfa.kernels.attention.fp8_quantize import quantize

    given = problem("gaussian", FLUX, device)
    exact = given.exact()
    results = []
    for scale in (1.0, 16.0, 64.0, 256.0, 448.0):
        x = quantize(*given.heads, given.norm_q, given.norm_k)
        x.scalars[3, 0], x.scalars[4, 0] = 1 / scale, scale
        found = dequantize(cudnn_fp8.attend(x), x.descale, x.center).flatten(2)
        results.append(f"{scale:g}: {error(found, exact):.4f}")
    print("error by the scale of the probabilities:", ", ".join(results))


def microseconds(functions: list[Function]) -> tuple[float, float]:
    """Median and least of RUNS runs with rotating inputs, queued so that the host is not what is measured."""
    turns = cycle(functions)
    for _ in range(5):
        next(turns)()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)
    for begin, end in marks:
        begin.record()
        next(turns)()
        end.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) * 1e3 for begin, end in marks]
    return statistics.median(times), min(times)


def recorded(function: Function) -> Function:
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def times(device: torch.device) -> None:
    from tonfa.kernels.attention import cudnn_fp8, fp8
    from tonfa.kernels.attention.fp8_dequantize import dequantize
    from tonfa.kernels.attention.fp8_quantize import quantize

    given = [problem("outliers", FLUX, device, seed) for seed in range(INPUTS)]
    rounded = [quantize(*x.heads, x.norm_q, x.norm_k) for x in given]
    results = [cudnn_fp8.attend(x) for x in rounded]

    candidates: dict[str, list[Function]] = {
        "torch's choice": [partial(functional.scaled_dot_product_attention, *x.heads) for x in given],
        "16-bit (cuDNN)": [partial(sdpa.attention, *x.heads) for x in given],
        "fp8: quantize": [partial(quantize, *x.heads, x.norm_q, x.norm_k) for x in given],
        "fp8: attend": [partial(cudnn_fp8.attend, x) for x in rounded],
        "fp8: dequantize": [partial(dequantize, o, x.descale, x.center) for o, x in zip(results, rounded, strict=True)],
        "fp8: all": [partial(fp8.attention, *x.all) for x in given],
    }
    flops = 4 * FLUX[0] * FLUX[1] * FLUX[2] ** 2 * FLUX[3]
    print(f"\n{FLUX}: median (least) us; a step of FLUX has 57 of them")
    for name, functions in candidates.items():
        median, least = microseconds(functions)
        replayed, _ = microseconds([recorded(f) for f in functions])
        rate = "" if "quantize" in name else f", {flops / replayed / 1e6:.0f} TFLOP/s"
        print(f"  {name:16s} {median:7.1f} ({least:7.1f}), in a CUDA graph {replayed:7.1f}{rate}")
    started = time.perf_counter()
    for x in given * 20:
        fp8.attention(*x.all)
    host = (time.perf_counter() - started) / (20 * INPUTS)
    print(f"  host time of a call of all: at most {host * 1e6:.0f} us")
    torch.cuda.synchronize()


@contextmanager
def attending_by(function: Function) -> Iterator[None]:
    """Every block attends by `function` of q, k, v and the weights of their norms."""

    def call(
        self: Attention, layer: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, norm_q: Any, norm_k: Any
    ) -> Tensor:
        result: Tensor = function(q, k, v, norm_q, norm_k)
        return result

    with mock.patch.object(Attention, "of_heads", call):
        yield


def exactly(q: Tensor, k: Tensor, v: Tensor, norm_q: Any, norm_k: Any) -> Tensor:
    return sdpa.attention(q, k, v)


def by_maxima(q: Tensor, k: Tensor, v: Tensor, norm_q: Any, norm_k: Any) -> Tensor:
    """The specification with the maxima of each head for scales."""
    center = attention_fp8.center(v)
    v = attention_fp8.centered(v, center)
    scales = attention_fp8.Exponents(
        *(attention_fp8.largest_exponents(x.abs().amax((2, 3), keepdim=True)) for x in (q, k, v))
    )
    rounded = [attention_fp8.quantize(x, e) for x, e in zip((q, k, v), (scales.q, scales.k, scales.v), strict=True)]
    return attention_fp8.dequantize(attention_fp8.attend(*rounded, scales), scales.v.transpose(1, 2), center, q.dtype)


def smoothed(q: Tensor, k: Tensor, v: Tensor, norm_q: Any, norm_k: Any) -> Tensor:
    """The same with k less its mean over the tokens, which softmax does not see."""
    return by_maxima(q, k.float() - k.float().mean(2, keepdim=True), v, norm_q, norm_k)


WAYS: dict[str, Function] = {
    "fp8": attention_fp8.reference,
    "fp8, maxima of each head": by_maxima,
    "the same, k less its mean": smoothed,
}


def velocities(dense: Any, model: Any, draw: Callable[[], Any]) -> None:
    """How far each way moves what the model predicts, on the steps of one picture drawn with 16-bit attention."""
    moved: dict[str, list[float]] = {"4-bit weights": [], **{name: [] for name in WAYS}}

    def predict(*arguments: Any, **options: Any) -> Any:
        with attending_by(exactly):
            result = forward(*arguments, **options)
        exact = dense(*arguments, **options)[0]
        moved["4-bit weights"].append(error(result[0], exact))
        for name, function in WAYS.items():
            with attending_by(function):
                moved[name].append(error(forward(*arguments, **options)[0], result[0]))
        return result

    forward = model.forward
    model.set_cuda_graphs(False)
    with mock.patch.object(model, "forward", predict):
        draw()
    model.set_cuda_graphs(True)
    print(f"\nrelative change of the demo model's velocity: mean (largest) of {len(moved['fp8'])} steps")
    for name, values in moved.items():
        print(f"  {name:28s} {statistics.mean(values):.4f} ({max(values):.4f})")


def demo(device: torch.device, steps: int, count: int) -> None:
    """The demo model with 4-bit weights: how far FP8 attention moves its velocities and its pictures."""
    sys.path.insert(0, str(ROOT / "demo"))
    from diffusers import FluxControlPipeline

    from run import picture, psnr, read_problems
    from tonfa import SVDQFluxTransformer2DModel
    from tonfa.cli.pipeline import quieten_libraries

    quieten_libraries()
    pipe = FluxControlPipeline.from_pretrained(ROOT / "demo" / "model", dtype=torch.bfloat16).to(device)
    pipe.set_progress_bar_config(disable=True)
    problems = read_problems(ROOT / "demo" / "inputs")[:count]
    exact = [picture(pipe, p, steps) for p in problems]
    dense = pipe.transformer
    model = SVDQFluxTransformer2DModel.from_dense(dense)
    pipe.transformer = model
    velocities(dense, model, lambda: picture(pipe, problems[0], 6))

    drawn = [picture(pipe, p, steps) for p in problems]
    if device.type == "cuda":
        model.set_attention("fp8")
        moved = [picture(pipe, p, steps) for p in problems]
    else:
        with attending_by(attention_fp8.reference):
            moved = [picture(pipe, p, steps) for p in problems]
    print(f"PSNR in dB of {count} pictures after {steps} steps, 4-bit weights unless said otherwise:")
    for name, left, right in (
        ("fp8 attention against 16-bit", moved, drawn),
        ("16-bit attention against 16-bit weights", drawn, exact),
        ("fp8 attention against 16-bit weights", moved, exact),
    ):
        print(f"  {name:40s}", " ".join(f"{psnr(a, b):6.2f}" for a, b in zip(left, right, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda", 0))
    parser.add_argument("--steps", type=int, default=20, help="denoising steps of the demo's pictures")
    parser.add_argument("--pictures", type=int, default=4, help="of the demo")
    parser.add_argument("--no-demo", action="store_true")
    parser.add_argument("--diagnose", action="store_true", help="build graphs alone, and give cuDNN's reasons")
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    if arguments.diagnose:
        log = with_log()
        versions(device)
        if not diagnose(log):
            raise SystemExit("cuDNN does not build the graph that tonfa runs: see above")
        return
    good = True
    with torch.inference_mode():
        versions(device)
        if device.type == "cuda":
            chosen = bind_attention(device, "fp8")
            good = chosen is not None and plans(device) and errors(device, chosen.attention, SHAPES)
            if good:
                probability_scales(device)
                times(device)
        else:
            errors(device, None, ((1, 2, 512, 128),))
        if good and not arguments.no_demo:
            demo(device, arguments.steps, arguments.pictures)
    if not good:
        raise SystemExit("the FP8 kernels are wrong: see above")


if __name__ == "__main__":
    main()
