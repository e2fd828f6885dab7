"""One step of a FLUX transformer: the 4-bit model beside its baselines, their memory, and where our time goes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tonfa.bench import ceilings, dense, memory, parts, prediction, synthetic
from tonfa.bench.protocol import Say, Timing, interleaved, record
from tonfa.bench.variant import CHECK_SIZE, CHECK_TEXT, Variant, build, check, finite
from tonfa.bench.work import flux_work
from tonfa.dispatch import bind_attention
from tonfa.errors import UnsupportedError
from tonfa.layers.linear import SVDQLinear

RANK_0 = "rank-0"
"""The first variant without its low-rank branch."""
BASELINES = (*dense.DENSE_BASELINES, dense.EAGER_CUDNN, RANK_0)

_FAILURES = (RuntimeError, TypeError, AttributeError, AssertionError)
"""What other people's code raises: compilers and a full GPU RuntimeError, versions that do not fit the others."""


@dataclass(frozen=True)
class StepCase:
    """What one step computes."""

    height: int
    width: int
    batch: int
    text_tokens: int

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.height} x {self.width}, batch {self.batch}"


@dataclass(frozen=True)
class StepRequest:
    """Everything that `tonfa bench step` was asked for."""

    config: Mapping[str, Any]
    cases: Sequence[StepCase]
    variants: Sequence[Variant]
    baselines: Sequence[str]
    explicit: bool
    """Whether the baselines were named by the user: then one that cannot run is an error."""
    runs: int
    seed: int
    device: torch.device
    seconds: float | None = None
    """A limit for the timed runs of a case."""
    parts: bool = True
    """Whether our steps are divided into parts on a GPU."""


@dataclass(frozen=True)
class Candidate:
    """A model that is timed."""

    name: str
    settings: Mapping[str, Any]
    model: Any
    weights_gib: float
    ours: Variant | None = None
    """None for a model of others."""

    def step(self, inputs: Mapping[str, Any]) -> Tensor:
        """The velocity."""
        output: Tensor = self.model(**inputs)[0]
        return output

    def forget_graphs(self) -> None:
        """Free what steps of other shapes recorded."""
        if self.ours is not None:
            self.model.set_cuda_graphs(self.ours.graph)


def _kernel_name(function: Any) -> str:
    function = getattr(function, "func", function)
    return f"{function.__module__}.{function.__qualname__}".removeprefix("tonfa.")


class StepBench:
    """Builds every model once, then measures case by case.

    What does not fit into the GPU's memory is said and left out; everything else is measured.
    """

    def __init__(self, request: StepRequest, say: Say) -> None:
        self._request, self._say, self._device = request, say, request.device

    def run(self) -> Iterator[dict[str, Any]]:
        """One record for each candidate and case; ours first.

        Raises TonfaError where a variant computes wrong numbers or a baseline that was asked for cannot run.
        """
        with torch.no_grad():  # torch.compile and tensor subclasses know it better than inference_mode
            ours = self._ours()
            held = [self._held(case, ours) for case in self._request.cases]
            baselines = self._baselines(self._request.variants[0])
        for case, memories in zip(self._request.cases, held, strict=True):
            with torch.no_grad():
                records = list(self._case(case, [*ours, *baselines], memories))
            yield from records

    def _fits(self, what: str, run: Callable[[], Any]) -> bool:
        """Whether it was done; if not, the GPU's memory is full, which is said."""
        try:
            run()
        except torch.OutOfMemoryError as error:
            reason = next(iter(str(error).splitlines()), "")
            self._say(f"skipped {what}: {reason}")
        else:
            return True
        # The traceback, which holds what did not fit, is gone here.
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _ours(self) -> list[Candidate]:
        found: list[Candidate] = []

        def add(variant: Variant) -> None:
            found.append(self._candidate(variant))

        for variant in self._request.variants:
            try:
                self._fits(variant.name, partial(add, variant))
            except UnsupportedError as error:
                if len(self._request.variants) == 1:
                    raise
                self._say(f"skipped {variant.name}: {error}")
        if not found:
            raise UnsupportedError("none of the variants can run here")
        return found

    def _candidate(self, variant: Variant, name: str = "") -> Candidate:
        request = self._request
        error = check(variant, request.config, self._device, request.seed)
        self._say(f"checked {variant.name}: {error:.2%} from the reference on a small model")
        before = memory.allocated(self._device)
        model = build(variant, request.config, self._device, request.seed)
        inputs = synthetic.step_inputs(request.config, *CHECK_SIZE, text_tokens=CHECK_TEXT, device=self._device)
        finite(model.set_cuda_graphs(False)(**inputs)[0], variant.name)  # binds: packs weights, makes buffers
        del inputs
        held = (memory.allocated(self._device) - before) / 2**30 or memory.tensor_gib(model)
        model.set_cuda_graphs(variant.graph)
        layer = next(m for m in model.modules() if isinstance(m, SVDQLinear))
        kernels, chosen = layer.binding().kernels, bind_attention(self._device, variant.attention)
        self._say(f"built {variant.name}: {held:.2f} GiB, {kernels.backend} backend")
        settings = {
            "weights": variant.weights,
            "activations": variant.activations,
            "attention": variant.attention,
            "attention_kernel": _kernel_name(kernels.attention if chosen is None else chosen.attend),
            "fused": variant.fused,
            "graph": variant.graph and self._device.type == "cuda",
            "rank": variant.rank,
            "backend": kernels.backend,
        }
        return Candidate(name or variant.name, settings, model, held, variant)

    def _baselines(self, first: Variant) -> list[Candidate]:
        found: list[Candidate] = []
        models: list[dense.DenseModels] = []

        def add(name: str) -> None:
            if name == RANK_0:
                found.append(self._candidate(replace(first, rank=0), RANK_0))
                return
            reason = dense.missing(name, self._device)
            if reason is not None:
                raise UnsupportedError(f"baseline {name}: {reason}")
            if not models:
                models.append(dense.DenseModels(self._request.config, self._device, self._request.seed))
            model = models[0].build(name)
            weights = "fp8" if name == dense.TORCHAO else "bf16"
            settings = {
                "weights": weights,
                "activations": weights,
                "attention": dense.attention_backend(name, self._device),
                "graph": False,
                "compiled": name in dense.COMPILING,
            }
            found.append(Candidate(name, settings, model, memory.tensor_gib(model)))
            self._say(f"built {name}")

        for name in self._request.baselines:
            try:
                self._fits(f"baseline {name}", partial(add, name))
            except UnsupportedError as error:
                if self._request.explicit:
                    raise
                self._say(f"skipped {error}")
        return found

    def _inputs(self, case: StepCase) -> dict[str, Any]:
        return synthetic.step_inputs(
            self._request.config, case.height, case.width, case.batch, case.text_tokens, self._device
        )

    def _held(self, case: StepCase, candidates: Sequence[Candidate]) -> dict[str, dict[str, float]]:
        """Memory by candidate; those that do not fit are missing."""
        found: dict[str, dict[str, float]] = {}
        inputs = self._inputs(case)

        def measure(candidate: Candidate) -> None:
            graph = bool(candidate.settings["graph"])
            held = memory.step_memory(candidate.model, inputs, candidate.weights_gib, graph, self._device)
            self._say(f"memory of {candidate.name}, {case.name}: {memory.described(held)}")
            found[candidate.name] = held

        for candidate in candidates:
            self._fits(f"{candidate.name} at {case.name}", partial(measure, candidate))
            candidate.forget_graphs()
        return found

    def _case(
        self, case: StepCase, candidates: Sequence[Candidate], held: dict[str, dict[str, float]]
    ) -> Iterator[dict[str, Any]]:
        if any(candidate.settings.get("compiled") for candidate in candidates):
            torch.compiler.reset()  # every case is compiled for its own shapes, and counts towards no limit
        inputs = self._inputs(case)
        runnable = [
            c for c in candidates if (c.ours is None or c.name in {*held, RANK_0}) and self._runs(c, case, inputs)
        ]
        late = [c for c in runnable if c.name not in held]
        held.update(self._held(case, late))
        runnable = [c for c in runnable if c.name in held]
        yield from self._timed(case, runnable, inputs, held)
        for candidate in candidates:
            candidate.forget_graphs()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _timed(
        self,
        case: StepCase,
        candidates: Sequence[Candidate],
        inputs: Mapping[str, Any],
        held: Mapping[str, Mapping[str, float]],
    ) -> Iterator[dict[str, Any]]:
        request = self._request
        steps = {c.name: [partial(c.step, inputs)] for c in candidates}
        timings: dict[str, Timing] = {}
        if not steps:
            return

        def measure() -> None:
            timings.update(interleaved(steps, request.runs, self._device, seconds=request.seconds))

        limit = "" if request.seconds is None else f" in {request.seconds:g} s"
        self._say(f"{case.name}: {request.runs} runs{limit} of {len(steps)} candidates in turn")
        if not self._fits(f"all of {case.name}", measure):
            return
        reference = {c.name: timings[c.name] for c in candidates if c.name in request.baselines}
        rates = self._ceilings(case, candidates)
        for candidate in candidates:
            shares, floor = None, None
            if rates is not None and candidate.ours is not None and candidate.name != RANK_0:
                self._say(f"{case.name}: profiling a step of {candidate.name}")
                step_ms = timings[candidate.name].median
                shares, floor = self._parts(case, candidate, steps[candidate.name][0], step_ms, rates)
            yield record(
                bench="step",
                case={
                    "height": case.height,
                    "width": case.width,
                    "batch": case.batch,
                    "text_tokens": case.text_tokens,
                    "rank": candidate.settings.get("rank"),
                    "layers": [request.config["num_layers"], request.config["num_single_layers"]],
                    "hidden": self._hidden(),
                    "in_channels": request.config["in_channels"],
                    "seed": request.seed,
                },
                variant=candidate.name if candidate.ours is None else candidate.ours.name,
                settings=candidate.settings,
                timing=timings[candidate.name],
                device=self._device,
                baselines=reference,
                memory_gib=held[candidate.name],
                parts=shares,
                floor=floor,
                prediction=self._prediction(case, candidate.settings),
            )

    def _runs(self, candidate: Candidate, case: StepCase, inputs: Mapping[str, Any]) -> bool:
        """Whether its first step, which compiles it, succeeds.

        Raises UnsupportedError where it is a baseline that was named and fails otherwise than by a full GPU.
        """
        reason = self._reason_against(candidate, case)
        if reason is not None:
            self._say(f"skipped {candidate.name} at {case.name}: {reason}")
            return False
        self._say(f"{case.name}: first step of {candidate.name}")
        found: list[Tensor] = []
        try:
            fits = self._fits(f"{candidate.name} at {case.name}", lambda: found.append(candidate.step(inputs)))
        except _FAILURES as error:
            if candidate.ours is not None:
                raise
            first_line = next(iter(str(error).splitlines()), "")
            message = f"baseline {candidate.name} fails at {case.name}: {type(error).__name__}: {first_line}"
            if self._request.explicit:
                raise UnsupportedError(message) from error
            self._say(f"skipped {message}")
            return False
        for output in found:
            finite(output, candidate.name)
        return fits

    def _reason_against(self, candidate: Candidate, case: StepCase) -> str | None:
        """Attention that would silently be computed in 16 bits is not timed as FP8."""
        if candidate.ours is None:
            return None
        chosen = bind_attention(self._device, candidate.ours.attention)
        length = synthetic.tokens(case.height, case.width) + case.text_tokens
        config = self._request.config
        shape = torch.Size((case.batch, config["num_attention_heads"], length, config["attention_head_dim"]))
        if chosen is None or chosen.takes(shape, self._device):
            return None
        return f"its {candidate.ours.attention} attention does not take {tuple(shape)}"

    def _hidden(self) -> int:
        return int(self._request.config["num_attention_heads"] * self._request.config["attention_head_dim"])

    def _ceilings(self, case: StepCase, candidates: Sequence[Candidate]) -> ceilings.Ceilings | None:
        ours = [c.ours for c in candidates if c.ours is not None]
        if self._device.type != "cuda" or not self._request.parts or not ours:
            return None
        self._say(f"{case.name}: measuring what the GPU reaches at best")
        config = self._request.config
        work = flux_work(config, case.height, case.width, case.batch, case.text_tokens, 0)
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        found: list[ceilings.Ceilings] = []
        asked = {v.activations for v in ours}, {v.attention for v in ours}
        self._fits(
            f"the floors at {case.name}",
            lambda: found.append(ceilings.measure(work, heads, head_dim, case.batch, self._device, *asked)),
        )
        return found[0] if found else None

    def _prediction(self, case: StepCase, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        gpu = prediction.known_gpu(self._device) if settings.get("backend") == "cuda" else None
        if gpu is None:
            return None
        sizes = (case.height, case.width, case.batch, case.text_tokens, settings["rank"])
        return prediction.described(gpu, prediction.step_ms(gpu, self._request.config, *sizes))

    def _parts(
        self,
        case: StepCase,
        candidate: Candidate,
        step: Callable[[], Any],
        step_ms: float,
        rates: ceilings.Ceilings,
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        settings = candidate.settings
        work = flux_work(self._request.config, case.height, case.width, case.batch, case.text_tokens, settings["rank"])
        least = parts.floors(work, rates, settings["weights"], settings["activations"], settings["attention"])
        return parts.described(parts.profile_step(step, self._device), step_ms, least)
