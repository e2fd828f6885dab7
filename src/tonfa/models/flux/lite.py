"""Diffusers' `nunchaku_lite` folders as native tensors: Nunchaku's packing under Diffusers' own names, nothing fused.

Diffusers replaces each target of config.json's `quantization_config` by a 4-bit module of its size, without padding
(diffusers/quantizers/nunchaku). So q, k and v are linears of their own, and a single block's `proj_out` is one linear
over the attention's and the MLP's channels. GELU is an op of its own there: what follows it quantizes signed, unshifted
inputs. Modulations keep Diffusers' rows and their biases have no 1 added. One rank holds for all targets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tonfa.checkpoint.deviations import MOST_RANK, PARTS, PLUS_ONE, RANK, UNSIGNED
from tonfa.checkpoint.nunchaku_layout import RANK_TILE, TILE
from tonfa.checkpoint.strict import Spec, check
from tonfa.checkpoint.tensors import TensorFiles
from tonfa.errors import CheckpointError
from tonfa.formats import GROUP_SIZE
from tonfa.models.flux.nunchaku import Field, svdq_fields, unpacked, w4a16_fields
from tonfa.models.flux.plan import DENSE_CLASS
from tonfa.plan import LinearPlan, ModelPlan
from tonfa.quantizer.planned import part_names

METHOD = "nunchaku_lite"
SVDQ, AWQ = "svdq_w4a4", "awq_w4a16"

ROWS = {"qweight": 0, "wscales": 1, "bias": 0, "proj_up": 0}
"""Fields that have output channels, and in which dimension."""
COLUMNS = {"qweight": (1, 2), "wscales": (0, GROUP_SIZE), "smooth_factor": (0, 1), "proj_down": (0, 1)}
"""Fields that have input channels, in which dimension, and how many channels an entry holds."""

_SVDQ_FIELDS = ("qweight", "wscales", "bias", "smooth_factor", "proj_down", "proj_up")
_W4A16_FIELDS = ("qweight", "wscales", "wzeros", "bias")
_KEYS = {"quant_method", "compute_dtype", "pre_quantized", SVDQ, AWQ}
_SECTION_KEYS = {SVDQ: {"precision", "group_size", "targets", "rank"}, AWQ: {"precision", "group_size", "targets"}}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_LISTED = 10


@dataclass(frozen=True)
class LiteConfig:
    """What a folder's `quantization_config` says, once its targets are found to be the model's."""

    rank: int
    dtype: torch.dtype
    """Of all floats at run time: those of the files are cast to it."""


def is_lite(config: Mapping[str, Any]) -> bool:
    """Whether this config.json belongs to a `nunchaku_lite` folder."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD


def targets(plan: ModelPlan) -> dict[str, list[str]]:
    """The modules that a section of the configuration has to name, in the model's order."""
    named: dict[str, dict[str, None]] = {SVDQ: {}, AWQ: {}}
    for linear in plan.linears():
        named[SVDQ if linear.kind == "svdq" else AWQ] |= dict.fromkeys(linear.sources)
    return {section: list(names) for section, names in named.items()}


def parse_config(config: Mapping[str, Any], plan: ModelPlan, where: str) -> LiteConfig:
    """The checked configuration. Raises CheckpointError, naming the field, for what is not FLUX in INT4 as planned."""
    name = config.get("_class_name", DENSE_CLASS)
    if name != DENSE_CLASS:
        raise CheckpointError(f"{where}: is a {name}; of {METHOD} checkpoints, only those of {DENSE_CLASS} run here")
    quantization = config["quantization_config"]
    _check_keys(quantization, _KEYS, "quantization_config", where)
    dtype = quantization.get("compute_dtype")
    dtype = "bfloat16" if dtype is None else dtype
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where}: compute_dtype {dtype!r} is not supported, only {' and '.join(_DTYPES)} are")
    for section, expected in targets(plan).items():
        _check_section(quantization.get(section), section, expected, where)
    rank = quantization[SVDQ].get("rank")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= MOST_RANK or rank % RANK_TILE:
        raise CheckpointError(f"{where}: {SVDQ}.rank is {rank!r}, expected a multiple of {RANK_TILE}")
    return LiteConfig(rank, _DTYPES[dtype])


def _check_keys(found: Mapping[str, Any], known: set[str], what: str, where: str) -> None:
    unknown = sorted(str(key) for key in found.keys() - known)
    if unknown:
        raise CheckpointError(f"{where}: {what} has {', '.join(unknown[:_LISTED])}, which this version does not know")


def _check_section(found: Any, section: str, expected: list[str], where: str) -> None:
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{where}: {section} is {type(found).__name__}, expected an object")
    _check_keys(found, _SECTION_KEYS[section], section, where)
    precision, group_size, named = (found.get(key) for key in ("precision", "group_size", "targets"))
    if precision == "nvfp4":
        raise CheckpointError(f"{where}: {section} is in NVFP4; take an INT4 checkpoint")
    if precision != "int4":
        raise CheckpointError(f"{where}: {section}.precision {precision!r} is not supported, only 'int4' is")
    if group_size != GROUP_SIZE or isinstance(group_size, float):
        raise CheckpointError(f"{where}: {section}.group_size {group_size!r} is not supported, only {GROUP_SIZE} is")
    if not isinstance(named, list) or not all(isinstance(target, str) for target in named):
        raise CheckpointError(f"{where}: {section}.targets is no list of names")
    differences = {
        "lacks": set(expected) - set(named),
        "has": set(named) - set(expected),
        "repeats": {target for target, count in Counter(named).items() if count > 1},
    }
    for verb, names in differences.items():
        if names:
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            listed = ", ".join(sorted(names)[:_LISTED])
            raise CheckpointError(f"{where}: {section}.targets {verb} {listed}{more}; other FLUX layers than these run")


def lite_fields(plan: ModelPlan, rank: int, dtype: torch.dtype, where: str) -> dict[str, Field]:
    """Every tensor of the quantized modules by its name in the files.

    Raises CheckpointError for sizes that Nunchaku's tiles do not fit: these modules have no padding.
    """
    sizes: dict[str, tuple[str, int, int]] = {}
    for linear in plan.linears():
        n = linear.out_features // len(linear.sources)
        k = linear.in_features if linear.columns is None else linear.columns[1]
        for source in linear.sources:
            sizes[source] = (linear.kind, n, max(k, sizes.get(source, ("", 0, 0))[2]))
    fields: dict[str, Field] = {}
    for source, (kind, n, k) in sizes.items():
        if kind == "svdq" and (n % TILE or k % TILE):
            raise CheckpointError(f"{where}: {source} is {n} x {k}; {METHOD} layers need multiples of {TILE}")
        made = svdq_fields(n, k, rank, dtype) if kind == "svdq" else w4a16_fields(n, k, dtype)
        fields |= {f"{source}.{name}": field for name, field in made.items()}
    return fields


def same_bits(tensors: Iterable[Tensor]) -> bool:
    """Whether all tensors have the same bytes."""
    first, *others = (tensor.contiguous().view(torch.uint8) for tensor in tensors)
    return all(torch.equal(first, other) for other in others)


def find_deviations(files: TensorFiles, plan: ModelPlan, lite: LiteConfig, where: str) -> dict[str, dict[str, Any]]:
    """How the fused linears differ from the native rule (`checkpoint.deviations`), told by the tensors.

    q, k and v with one smoothing factor are stacked. With one `proj_down` too they keep their rank, otherwise their
    branches stand beside each other in three times the rank. With other smoothing factors they cannot be stacked.
    Tensors that are missing or misshapen change nothing here: `LiteTensors` lists them.
    """
    fields = lite_fields(plan, lite.rank, lite.dtype, where)
    spec = files.spec()

    def alike(linear: LinearPlan, field: str) -> bool:
        names = [f"{source}.{field}" for source in linear.sources]
        if any(name not in spec or spec[name][0] != fields[name].shape for name in names):
            return True
        return same_bits(files[name].to(lite.dtype) for name in names)

    layers: dict[str, dict[str, Any]] = {}
    for linear in plan.linears():
        if linear.kind == "w4a16":
            layers[linear.name] = {PLUS_ONE: False}
        elif linear.unsigned:
            layers[linear.name] = {UNSIGNED: False}
        elif not alike(linear, "smooth_factor"):
            layers[linear.name] = {PARTS: len(linear.sources)}
        elif not alike(linear, "proj_down"):
            layers[linear.name] = {RANK: len(linear.sources) * lite.rank}
    return layers


@dataclass(frozen=True)
class _Made:
    """A native tensor, made of these tensors of the files once they are unpacked."""

    sources: tuple[str, ...]
    combine: Callable[..., Tensor]


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _stacked(linear: LinearPlan, field: str) -> _Made:
    """One field of q, k and v together."""
    sources = tuple(f"{source}.{field}" for source in linear.sources)
    if field == "smooth_factor" or (field == "proj_down" and linear.rank is None):
        return _Made(sources[:1], _alone)
    if field == "proj_up" and linear.rank is not None:
        return _Made(sources, lambda *ups: torch.block_diag(*ups))
    dimension = ROWS.get(field, 1)
    return _Made(sources, lambda *parts: torch.cat(parts, dim=dimension))


def _cut(linear: LinearPlan, field: str, columns: tuple[int, int]) -> _Made:
    """One field of some columns of a linear."""
    sources = (f"{linear.sources[0]}.{field}",)
    if field in COLUMNS:
        dimension, channels = COLUMNS[field]
        start, stop = (column // channels for column in columns)
        return _Made(sources, lambda t: t.narrow(dimension, start, stop - start).contiguous())
    return _Made(sources, torch.zeros_like if field == "bias" and not linear.source_bias else _alone)


def _made(linear: LinearPlan) -> Iterator[tuple[str, _Made]]:
    """A planned linear's native tensors."""
    for field in _W4A16_FIELDS if linear.kind == "w4a16" else _SVDQ_FIELDS:
        if linear.columns is not None:
            yield f"{linear.name}.{field}", _cut(linear, field, linear.columns)
        elif len(linear.sources) > 1 and linear.parts == 1:
            yield f"{linear.name}.{field}", _stacked(linear, field)
        else:
            for module, source in zip(part_names(linear), linear.sources, strict=True):
                yield f"{module}.{field}", _Made((f"{source}.{field}",), _alone)


class LiteTensors(Mapping[str, Tensor]):
    """A folder's tensors by their native names, each unpacked and put together when it is asked for.

    `plan` has the deviations found in the files; `copies` gives the shapes of what is not quantized. Raises
    CheckpointError, listing names, unless the files hold exactly the tensors that Diffusers' modules have.
    """

    def __init__(self, source: TensorFiles, plan: ModelPlan, lite: LiteConfig, copies: Spec, where: str) -> None:
        names = [name for block in plan.blocks for name, _ in block.copies]
        self._dtype = lite.dtype
        self._packed = lite_fields(plan, lite.rank, lite.dtype, where)
        self._packed |= {name: unpacked(copies[name][0], lite.dtype) for name in names}
        check(source.spec(), {name: (field.shape, field.dtype) for name, field in self._packed.items()}, where)
        self._made = {name: _Made((name,), _alone) for name in names}
        self._made |= {name: made for linear in plan.linears() for name, made in _made(linear)}
        self._source = source

    def _combined(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        made = self._made[name]
        parts = (self._packed[source].unpack(read(source)) for source in made.sources)
        return made.combine(*(part.to(self._dtype) if part.is_floating_point() else part for part in parts))

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, "cpu")

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """One native tensor on `device`, unpacked there."""
        return self._combined(name, lambda source: self._source.read(source, device))

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def spec(self) -> Spec:
        """Shapes and dtypes of the native tensors."""

        def empty(source: str) -> Tensor:
            field = self._packed[source]
            return torch.empty(field.shape, dtype=field.dtype, device="meta")

        made = {name: self._combined(name, empty) for name in self._made}
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}
