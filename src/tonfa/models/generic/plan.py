"""The plan of any model: regular expressions on the names of its linears, resolved against the model itself.

Resolved, it is a `tonfa.plan.ModelPlan`, the type that FLUX's plan has: one entry a linear, with its form, its sizes
and the linear whose input it shares.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from tonfa.errors import FormatError, UnsupportedError
from tonfa.formats import GROUP_SIZE
from tonfa.plan import BlockPlan, LinearPlan, ModelPlan

Kind = Literal["svdq", "w4a16"]
KINDS: tuple[Kind, ...] = get_args(Kind)
NAMED = 8
"""Linears that an error lists."""


@dataclass(frozen=True)
class LinearRule:
    """How the linears are quantized whose whole name a regular expression matches."""

    pattern: str
    """Such as `blocks\\.\\d+\\.ff\\.net\\.2`."""
    kind: Kind = "svdq"
    """`svdq`: 4-bit weights, a low-rank branch, quantized activations. `w4a16`: 4-bit weights alone."""
    unsigned: bool = False
    """Behind a GELU: 4-bit activations are shifted and unsigned."""
    rank: int | None = None
    """Width of the low-rank branch; None is the recipe's."""

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise UnsupportedError(f"plan: {self.pattern!r} is no pattern; patterns are strings")
        if self.kind not in KINDS:
            raise UnsupportedError(f"plan: kind {self.kind!r} is unknown; choose one of {', '.join(KINDS)}")


@dataclass(frozen=True)
class Plan:
    """Which linears of a model are quantized, and how. Raises UnsupportedError for patterns that are none.

    A linear follows the first entry of `include` that matches its whole name, unless one of `exclude` does. Linears
    that read the same tensor share their smoothing factors: `shared_inputs` are patterns whose captured groups are
    equal for linears that do, such as `(blocks\\.\\d+\\.attn)\\.to_[qkv]`; with `detect_shared` the others are found
    when calibration inputs run through the model.
    """

    include: tuple[LinearRule | str, ...]
    exclude: tuple[str, ...] = ()
    shared_inputs: tuple[str, ...] = ()
    detect_shared: bool = True
    skip_unsupported: bool = False
    """Leave linears in 16 bits whose sizes do not fit the format, instead of raising an error."""

    def __post_init__(self) -> None:
        if isinstance(self.include, (str, LinearRule)) or not self.include:
            raise UnsupportedError("plan: include must be a sequence of patterns or rules, and name something")
        for name in ("exclude", "shared_inputs"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise UnsupportedError(f"plan: {name} must be a sequence of patterns, got {patterns!r}")
        for pattern in (*(rule.pattern for rule in self.rules()), *self.exclude, *self.shared_inputs):
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise UnsupportedError(f"plan: {pattern!r} is no regular expression: {error}") from error
            if pattern in self.shared_inputs and not compiled.groups:
                raise UnsupportedError(f"plan: {pattern!r} in shared_inputs captures nothing; put what is common in ()")

    def rules(self) -> Iterator[LinearRule]:
        """The entries of `include`, plain patterns as rules."""
        for entry in self.include:
            yield entry if isinstance(entry, LinearRule) else LinearRule(entry)


@dataclass(frozen=True)
class ResolvedPlan:
    """A plan applied to one model."""

    plan: ModelPlan
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Linears that were named and stay as they are, with the reason."""


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear inside of a model by its first name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name}


def reason_against(linear: nn.Linear, kind: str, rank: int) -> str | None:
    """Why a linear cannot be quantized so, or None."""
    n, k = linear.out_features, linear.in_features
    if isinstance(linear, NonDynamicallyQuantizableLinear):
        return "its owner reads its weight without calling it, as torch.nn.MultiheadAttention does"
    if type(linear).forward is not nn.Linear.forward:
        return f"{type(linear).__name__} computes something else than torch.nn.Linear"
    if k % GROUP_SIZE:
        return f"its {k} input channels are no multiple of the group size {GROUP_SIZE}"
    if kind == "svdq" and rank > min(n, k):
        return f"rank {rank} exceeds the smaller side of {n} x {k}"
    return None


def _read_by_owner(model: nn.Module) -> set[nn.Module]:
    """Linears of encoder layers, which in `eval` hand the weights themselves to a fused kernel."""
    layers = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    return {linear for layer in layers for linear in (layer.linear1, layer.linear2)}


def resolve(plan: Plan, model: nn.Module, rank: int) -> ResolvedPlan:
    """The plan's linears in the model's order; `rank` is that of rules that name none.

    Raises UnsupportedError for a pattern that matches no linear, and FormatError, naming the linear, for one that
    cannot be quantized, unless the plan skips those.
    """
    linears = linears_of(model)
    rules = list(plan.rules())
    for pattern in (*(rule.pattern for rule in rules), *plan.exclude, *plan.shared_inputs):
        if not any(re.fullmatch(pattern, name) for name in linears):
            raise UnsupportedError(f"plan: {pattern!r} matches no torch.nn.Linear of the model; {_listed(linears)}")
    bypassed = _read_by_owner(model)
    entries: list[LinearPlan] = []
    skipped: dict[str, str] = {}
    for name, linear in linears.items():
        rule = next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None)
        if rule is None or any(re.fullmatch(pattern, name) for pattern in plan.exclude):
            continue
        reason = reason_against(linear, rule.kind, rule.rank or rank)
        if linear in bypassed:
            reason = "its owner reads its weight without calling it, as torch.nn.TransformerEncoderLayer does"
        if reason is not None and not plan.skip_unsupported:
            raise FormatError(f"{name}: {reason}; exclude it, or let the plan skip_unsupported")
        if reason is not None:
            skipped[name] = reason
            continue
        entries.append(_entry(name, linear, rule))
    if not entries:
        raise UnsupportedError(f"plan: no linear is left to quantize; {_listed(linears)}")
    return ResolvedPlan(_single_block(_share_named(entries, plan.shared_inputs)), skipped)


def with_shared(plan: ModelPlan, leaders: Mapping[str, str]) -> ModelPlan:
    """The plan with `shares_input` set for the linears in `leaders`."""
    return _single_block([replace(e, shares_input=leaders.get(e.name, e.shares_input)) for e in plan.linears()])


def _single_block(entries: list[LinearPlan]) -> ModelPlan:
    return ModelPlan((BlockPlan("model", tuple(entries)),))


def _entry(name: str, linear: nn.Linear, rule: LinearRule) -> LinearPlan:
    n, k = linear.out_features, linear.in_features
    has_bias = linear.bias is not None
    return LinearPlan(name, (name,), n, k, rule.kind, source_bias=has_bias, unsigned=rule.unsigned, rank=rule.rank)


def _share_named(entries: list[LinearPlan], patterns: tuple[str, ...]) -> list[LinearPlan]:
    """Entries whose names a pattern matches with equal groups share the input of the first of them."""
    leaders: dict[tuple[str, tuple[str | None, ...]], LinearPlan] = {}
    found = []
    for entry in entries:
        for pattern in patterns if entry.kind == "svdq" else ():
            match = re.fullmatch(pattern, entry.name)
            if match is None:
                continue
            first = leaders.setdefault((pattern, match.groups()), entry)
            if (first.in_features, first.unsigned) != (entry.in_features, entry.unsigned):
                raise FormatError(f"{entry.name}: cannot share the input of {first.name}, which is read differently")
            if first is not entry:
                entry = replace(entry, shares_input=first.name)
            break
        found.append(entry)
    return found


def _listed(linears: Mapping[str, nn.Linear]) -> str:
    names = list(linears)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"its linears are {', '.join(names[:NAMED])}{more}" if names else "it has none"
