"""One step of a FLUX transformer: the 4-bit model beside its baselines, their memory, and where our time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tonfa.bench import ceilings, dense, memory, parts, prediction, synthetic
from tonfa.bench.protocol import Say, interleaved, record
from tonfa.bench.variant import CHECK_SIZE, CHECK_TEXT, Variant, build, check, finite
from tonfa.bench.work import flux_work
from tonfa.errors import UnsupportedError
from tonfa.layers.linear import SVDQLinear

RANK_0 = "rank-0"
"""The first variant without its low-rank branch."""
BASELINES = (*dense.DENSE_BASELINES, RANK_0)

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


@dataclass
class _Candidate:
    """A model that is timed."""

    variant: str
    settings: dict[str, Any]
    model: Any
    weights_gib: float


def _kernel_name(function: Any) -> str:
    function = getattr(function, "func", function)
    return f"{function.__module__}.{function.__qualname__}".removeprefix("tonfa.")


class StepBench:
    """Builds every model once, then measures case by case."""

    def __init__(self, request: StepRequest, say: Say) -> None:
        self._request, self._say, self._device = request, say, request.device

    def run(self) -> Iterator[dict[str, Any]]:
        """One record for each candidate and case; ours first.

        Raises TonfaError where a variant computes wrong numbers or a baseline that was asked for cannot run.
        """
        with torch.no_grad():  # torch.compile and tensor subclasses know it better than inference_mode
            ours = self._ours()
            held = {
                (candidate.variant, case): self._memory(candidate, case)
                for candidate in ours
                for case in self._request.cases
            }
            baselines = self._baselines(self._request.variants[0])
        for case in self._request.cases:
            with torch.no_grad():
                records = list(self._case(case, ours, baselines, held))
            yield from records

    def _ours(self) -> list[_Candidate]:
        found = []
        for variant in self._request.variants:
            try:
                found.append(self._candidate(variant))
            except UnsupportedError as error:
                if len(self._request.variants) == 1:
                    raise
                self._say(f"skipped {variant.name}: {error}")
        if not found:
            raise UnsupportedError("none of the variants can run here")
        return found

    def _candidate(self, variant: Variant) -> _Candidate:
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
        kernels = layer.binding().kernels
        self._say(f"built {variant.name}: {held:.2f} GiB, {kernels.backend} backend")
        settings = {
            "weights": variant.weights,
            "activations": variant.activations,
            "attention": _kernel_name(kernels.attention),
            "graph": variant.graph and self._device.type == "cuda",
            "rank": variant.rank,
            "backend": kernels.backend,
        }
        return _Candidate(variant.name, settings, model, held)

    def _baselines(self, first: Variant) -> dict[str, _Candidate]:
        found: dict[str, _Candidate] = {}
        models: dense.DenseModels | None = None
        for name in self._request.baselines:
            try:
                if name == RANK_0:
                    found[name] = self._candidate(replace(first, rank=0))
                    continue
                reason = dense.missing(name, self._device)
                if reason is not None:
                    raise UnsupportedError(f"baseline {name}: {reason}")
                models = models or dense.DenseModels(self._request.config, self._device, self._request.seed)
                model = models.build(name)
            except UnsupportedError as error:
                if self._request.explicit:
                    raise
                self._say(f"skipped {error}")
                continue
            weights = "fp8" if name == dense.TORCHAO else "bf16"
            settings = {
                "weights": weights,
                "activations": weights,
                "attention": dense.attention_backend(name, self._device),
                "graph": False,
                "compiled": name != dense.EAGER,
            }
            found[name] = _Candidate(name, settings, model, memory.tensor_gib(model))
            self._say(f"built {name}")
        return found

    def _inputs(self, case: StepCase) -> dict[str, Any]:
        return synthetic.step_inputs(
            self._request.config, case.height, case.width, case.batch, case.text_tokens, self._device
        )

    def _memory(self, candidate: _Candidate, case: StepCase) -> dict[str, float]:
        graph = bool(candidate.settings["graph"])
        found = memory.step_memory(candidate.model, self._inputs(case), candidate.weights_gib, graph, self._device)
        self._say(f"memory of {candidate.variant}, {case.name}: {memory.described(found)}")
        return found

    def _case(
        self,
        case: StepCase,
        ours: Sequence[_Candidate],
        baselines: Mapping[str, _Candidate],
        held: dict[tuple[str, StepCase], dict[str, float]],
    ) -> Iterator[dict[str, Any]]:
        if any(candidate.settings.get("compiled") for candidate in baselines.values()):
            torch.compiler.reset()  # every case is compiled for its own shapes, and counts towards no limit
        inputs = self._inputs(case)
        for candidate in ours:
            finite(candidate.model(**inputs)[0], candidate.variant)
        baselines = {name: c for name, c in baselines.items() if self._runs(name, c, case, inputs)}
        everyone = {**{c.variant: c for c in ours}, **baselines}
        steps = {name: _step(candidate.model, inputs) for name, candidate in everyone.items()}
        for candidate in baselines.values():
            held[candidate.variant, case] = self._memory(candidate, case)
        self._say(f"{case.name}: {self._request.runs} runs of {len(steps)} candidates in turn")
        timings = interleaved({name: [step] for name, step in steps.items()}, self._request.runs, self._device)
        reference = {name: timings[name] for name in baselines}
        rates = self._ceilings(case)
        for name, candidate in everyone.items():
            shares, floor = None, None
            if rates is not None and name not in baselines:
                self._say(f"{case.name}: profiling a step of {name}")
                shares, floor = self._parts(case, candidate, steps[name], timings[name].median, rates)
            yield record(
                bench="step",
                case={
                    "height": case.height,
                    "width": case.width,
                    "batch": case.batch,
                    "text_tokens": case.text_tokens,
                    "rank": candidate.settings.get("rank"),
                    "layers": [self._request.config["num_layers"], self._request.config["num_single_layers"]],
                    "hidden": self._hidden(),
                    "in_channels": self._request.config["in_channels"],
                    "seed": self._request.seed,
                },
                variant=candidate.variant,
                settings=candidate.settings,
                timing=timings[name],
                device=self._device,
                baselines=reference,
                memory_gib=held[candidate.variant, case],
                parts=shares,
                floor=floor,
                prediction=self._prediction(case, candidate.settings),
            )

    def _runs(self, name: str, candidate: _Candidate, case: StepCase, inputs: Mapping[str, Any]) -> bool:
        """Whether a baseline's first step, which compiles it, succeeds."""
        self._say(f"{case.name}: first step of {name}")
        try:
            output = candidate.model(**inputs)[0]
        except _FAILURES as error:
            first_line = next(iter(str(error).splitlines()), "")
            reason = f"baseline {name} fails at {case.name}: {type(error).__name__}: {first_line}"
            if self._request.explicit:
                raise UnsupportedError(reason) from error
            self._say(f"skipped {reason}")
            return False
        finite(output, name)
        return True

    def _hidden(self) -> int:
        return int(self._request.config["num_attention_heads"] * self._request.config["attention_head_dim"])

    def _ceilings(self, case: StepCase) -> ceilings.Ceilings | None:
        if self._device.type != "cuda":
            return None
        self._say(f"{case.name}: measuring what the GPU reaches at best")
        config = self._request.config
        work = flux_work(config, case.height, case.width, case.batch, case.text_tokens, 0)
        heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
        return ceilings.measure(work, heads, head_dim, case.batch, self._device)

    def _prediction(self, case: StepCase, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        gpu = prediction.known_gpu(self._device) if settings.get("backend") == "cuda" else None
        if gpu is None:
            return None
        sizes = (case.height, case.width, case.batch, case.text_tokens, settings["rank"])
        return prediction.described(gpu, prediction.step_ms(gpu, self._request.config, *sizes))

    def _parts(
        self,
        case: StepCase,
        candidate: _Candidate,
        step: Callable[[], Tensor],
        step_ms: float,
        rates: ceilings.Ceilings,
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        settings = candidate.settings
        work = flux_work(self._request.config, case.height, case.width, case.batch, case.text_tokens, settings["rank"])
        least = parts.floors(work, rates, settings["weights"], settings["activations"])
        return parts.described(parts.profile_step(step, self._device), step_ms, least)


def _step(model: Any, inputs: Mapping[str, Any]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        output: Tensor = model(**inputs)[0]
        return output

    return step
