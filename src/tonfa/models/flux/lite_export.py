"""A 4-bit FLUX transformer as a `nunchaku_lite` folder, which Diffusers loads by itself: see `lite.py` for the format.

Codes, scales, smoothing factors and branches are kept to the bit. What changes: the linear behind a GELU quantizes
signed inputs without a shift (its bias loses the shift's correction and is rounded again), and all branches have one
rank, filled up with zeros. A single block's `proj_out` is one linear again: its branch has the rank of its halves where
they share `proj_up`, that of both together otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.checkpoint.nunchaku_layout import RANK_TILE, padded
from tonfa.checkpoint.strict import Spec, dtype_name
from tonfa.errors import CheckpointError
from tonfa.formats import GROUP_SIZE
from tonfa.models.flux.lite import AWQ, COLUMNS, METHOD, ROWS, SVDQ, lite_fields, same_bits, targets
from tonfa.plan import LinearPlan
from tonfa.quantizer.planned import part_names
from tonfa.weights import SVDQWeights

if TYPE_CHECKING:
    from tonfa.models.flux.export import QuantizedFlux


@dataclass(frozen=True)
class _Branch:
    """A module's low-rank branch: its rank, and how its two matrices are made."""

    rank: int
    down: Callable[[], Tensor]  # (K, rank)
    up: Callable[[], Tensor]  # (N, rank)


@dataclass(frozen=True)
class _Rows:
    """Rows of a native linear: those that source number `index` was stacked from."""

    linear: LinearPlan
    index: int


class LiteForm:
    """What is written. Raises CheckpointError for a model that the format cannot hold."""

    def __init__(self, model: QuantizedFlux) -> None:
        if model.dtype.itemsize != 2:
            raise CheckpointError(f"{model.where}: its floats are {dtype_name(model.dtype)}, but {METHOD} has 16 bits")
        self._model, self._source = model, model.source
        self._pieces: dict[str, list[_Rows]] = {}
        for linear in model.plan.linears():
            for i, source in enumerate(linear.sources):
                self._pieces.setdefault(source, []).append(_Rows(linear, i))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda rows: rows.linear.columns or (0, 0))
        self._targets = targets(model.plan)
        self._branches = {source: self._joined(self._pieces[source]) for source in self._targets[SVDQ]}
        widest = max((branch.rank for branch in self._branches.values()), default=model.rank)
        self.rank = padded(widest, RANK_TILE)
        self._packed = lite_fields(model.plan, self.rank, model.dtype, model.where)
        self._copies = {source: target for block in model.plan.blocks for target, source in block.copies}

    @property
    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of the weights."""
        int4 = {"precision": "int4", "group_size": GROUP_SIZE}
        return {
            "quant_method": METHOD,
            "compute_dtype": dtype_name(self._model.dtype),
            SVDQ: {**int4, "rank": self.rank, "targets": self._targets[SVDQ]},
            AWQ: {**int4, "targets": self._targets[AWQ]},
        }

    @property
    def spec(self) -> Spec:
        """Shapes and dtypes by name in the files."""
        copies = {name: self._model.spec[target] for name, target in self._copies.items()}
        return {name: (field.shape, field.dtype) for name, field in self._packed.items()} | copies

    def __getitem__(self, name: str) -> Tensor:
        """One tensor as the files hold it."""
        if name in self._copies:
            return self._source[self._copies[name]]
        module, _, field = name.rpartition(".")
        return self._packed[name].pack(self._field(module, field))

    def _field(self, module: str, field: str) -> Tensor:
        """One field of a module in logical order, in the native layout."""
        pieces = self._pieces[module]
        if field in ("proj_down", "proj_up"):
            branch = self._branches[module]
            matrix = branch.down() if field == "proj_down" else branch.up()
            return functional.pad(matrix, (0, self.rank - branch.rank))
        if field == "bias":
            return self._bias(pieces)
        parts = [self._rows(rows, field) for rows in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=COLUMNS[field][0])

    def _rows(self, rows: _Rows, field: str) -> Tensor:
        linear, names = rows.linear, part_names(rows.linear)
        if len(names) > 1:
            return self._source[f"{names[rows.index]}.{field}"]
        tensor = self._source[f"{linear.name}.{field}"]
        return tensor.chunk(len(linear.sources), dim=ROWS[field])[rows.index] if field in ROWS else tensor

    def _bias(self, pieces: list[_Rows]) -> Tensor:
        """The sum of the pieces' biases, without the shift behind a GELU and the 1 of a modulation's scales."""
        biases = [self._plain_bias(rows) for rows in pieces]
        terms = [bias for bias in biases if bias.any()] or biases[-1:]  # a sum with zeros would change -0.0
        if len(terms) == 1:
            return terms[0]
        return torch.stack([bias.float() for bias in terms]).sum(dim=0).to(self._model.dtype)

    def _plain_bias(self, rows: _Rows) -> Tensor:
        linear = rows.linear
        if linear.unsigned:
            weights = self._model.linear(linear)
            assert isinstance(weights, SVDQWeights)
            return weights.unshifted().bias.to(self._model.dtype)
        bias = self._rows(rows, "bias")
        for start, stop in linear.plus_one:
            bias = torch.cat((bias[:start], bias[start:stop] - 1, bias[stop:]))
        return bias

    def _joined(self, pieces: list[_Rows]) -> _Branch:
        """The branch of a module: that of its only piece, or of pieces that read neighboring channels."""
        branches = [self._branch(rows) for rows in pieces]
        if len(branches) == 1:
            return branches[0]
        if len({branch.rank for branch in branches}) == 1 and same_bits(branch.up() for branch in branches):
            return _Branch(branches[0].rank, lambda: torch.cat([b.down() for b in branches]), branches[0].up)
        return _Branch(
            sum(branch.rank for branch in branches),
            lambda: torch.block_diag(*(b.down() for b in branches)),
            lambda: torch.cat([b.up() for b in branches], dim=1),
        )

    def _branch(self, rows: _Rows) -> _Branch:
        """The branch of some rows: of their own where stacking has put several beside each other, else the whole."""
        linear, count = rows.linear, len(rows.linear.sources)
        rank = linear.rank or self._model.rank
        down, up = partial(self._rows, rows, "proj_down"), partial(self._rows, rows, "proj_up")
        if linear.parts > 1 or rank != count * self._model.rank or count == 1 or not self._is_block_diagonal(linear):
            return _Branch(rank, down, up)
        columns = slice(rows.index * self._model.rank, (rows.index + 1) * self._model.rank)
        return _Branch(self._model.rank, lambda: down()[:, columns], lambda: up()[:, columns])

    def _is_block_diagonal(self, linear: LinearPlan) -> bool:
        """Whether each source's rows of `proj_up` use columns of their own alone."""
        count = len(linear.sources)
        blocks = [rows.chunk(count, dim=1) for rows in self._source[f"{linear.name}.proj_up"].chunk(count)]
        return not any(block.any() for i, row in enumerate(blocks) for j, block in enumerate(row) if i != j)
