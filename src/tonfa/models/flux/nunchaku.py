"""Nunchaku's FLUX checkpoints as native tensors and back: the names of both dialects, the packing of each tensor.

"v1" names stand in all published files, "v2" names in those of Nunchaku's newer Python model; only names differ. The
INT4 layers are W4A4 with a low-rank branch, the modulations W4A16 with rows interleaved and the 1 of the scales in the
bias; whatever lies outside of the blocks has Diffusers' names in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from tonfa.checkpoint import nunchaku_layout as layout
from tonfa.checkpoint.strict import Spec, check
from tonfa.checkpoint.tensors import TensorFiles
from tonfa.errors import CheckpointError
from tonfa.formats import GROUP_SIZE, INT4, UINT4
from tonfa.models.flux.plan import FluxDims, flux_plan
from tonfa.plan import LinearPlan, ModelPlan

Dialect = Literal["v1", "v2"]

# What a block holds: its native name, its v1 name, its v2 name. Names that are missing here are the same everywhere.
_DOUBLE = (
    ("attn.to_qkv", "qkv_proj", "attn.to_qkv"),
    ("attn.add_qkv_proj", "qkv_proj_context", "attn.add_qkv_proj"),
    ("attn.to_out", "out_proj", "attn.to_out.0"),
    ("attn.to_add_out", "out_proj_context", "attn.to_add_out"),
    ("attn.norm_q", "norm_q", "attn.norm_q"),
    ("attn.norm_k", "norm_k", "attn.norm_k"),
    ("attn.norm_added_q", "norm_added_q", "attn.norm_added_q"),
    ("attn.norm_added_k", "norm_added_k", "attn.norm_added_k"),
    ("ff.up", "mlp_fc1", "ff.net.0.proj"),
    ("ff.down", "mlp_fc2", "ff.net.2"),
    ("ff_context.up", "mlp_context_fc1", "ff_context.net.0.proj"),
    ("ff_context.down", "mlp_context_fc2", "ff_context.net.2"),
)
_SINGLE = (
    ("attn.to_qkv", "qkv_proj", "attn.to_qkv"),
    ("attn.to_out", "out_proj", "attn.to_out"),
    ("attn.norm_q", "norm_q", "attn.norm_q"),
    ("attn.norm_k", "norm_k", "attn.norm_k"),
    ("ff.up", "mlp_fc1", "mlp_fc1"),
    ("ff.down", "mlp_fc2", "mlp_fc2"),
)
_MODULES = {"transformer_blocks": _DOUBLE, "single_transformer_blocks": _SINGLE}
_FIELDS = {
    "v1": {"smooth_factor": "smooth", "proj_down": "lora_down", "proj_up": "lora_up"},
    "v2": {},
}
_UNUSED = {"v1": "smooth_orig", "v2": "smooth_factor_orig"}
"""A second smoothing factor that the published quantizer writes and no engine reads; optional here."""


_Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Field:
    """A tensor as files hold it, and the ways to and from the native one."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    unpack: _Map
    pack: _Map

    def named(self, name: str) -> PackedTensor:
        """The tensor under its name in the file."""
        return PackedTensor(self.shape, self.dtype, self.unpack, self.pack, name)


@dataclass(frozen=True)
class PackedTensor(Field):
    """A field of one layer."""

    name: str


def detect_dialect(names: Iterable[str]) -> Dialect:
    """The dialect of a Nunchaku checkpoint's names."""
    return "v1" if any(name.endswith(".lora_down") for name in names) else "v2"


def branch_rank(found: Spec, where: str) -> int:
    """The rank of a Nunchaku checkpoint's low-rank branches. Raises CheckpointError if there is no such."""
    ranks = {shape[-1:] for name, (shape, _) in found.items() if name.endswith((".lora_down", ".proj_down"))}
    if not ranks:
        raise CheckpointError(f"{where}: holds no low-rank branches, so it is no Nunchaku SVDQuant checkpoint")
    rank = next(iter(ranks))
    if len(ranks) > 1 or not rank or rank[0] < 1 or rank[0] % layout.RANK_TILE:
        raise CheckpointError(f"{where}: branches of ranks {sorted(ranks)}; expected one positive multiple of 16")
    return rank[0]


def _module_name(native: str, dialect: Dialect) -> str:
    stack, _, rest = native.partition(".")
    index, _, module = rest.partition(".")
    for name, v1, v2 in _MODULES.get(stack, ()):
        if name == module:
            return f"{stack}.{index}.{v1 if dialect == 'v1' else v2}"
    return native


def svdq_fields(n: int, k: int, rank: int, dtype: torch.dtype) -> dict[str, Field]:
    """The packed tensors of a 4-bit linear (N, K) by the names of their native fields."""
    rows, channels, groups = layout.padded(n), layout.padded(k), layout.padded(k // GROUP_SIZE, 2)
    vector = layout.pack_vector
    return {
        "qweight": Field(
            (rows, channels // 2),
            torch.int8,
            lambda t: INT4.pack(layout.unpack_codes(t, n, k)),
            lambda t: layout.pack_codes(INT4.unpack(t)),
        ),
        "wscales": Field(
            (groups, rows),
            dtype,
            partial(layout.unpack_scales, groups=k // GROUP_SIZE, n=n),
            layout.pack_scales,
        ),
        "bias": Field((rows,), dtype, partial(layout.unpack_vector, size=n), vector),
        "smooth_factor": Field((channels,), dtype, partial(layout.unpack_vector, size=k), vector),
        "proj_down": Field(
            (channels, rank),
            dtype,
            partial(layout.unpack_lowrank, channels=k, down=True),
            partial(layout.pack_lowrank, down=True),
        ),
        "proj_up": Field(
            (rows, rank),
            dtype,
            partial(layout.unpack_lowrank, channels=n, down=False),
            partial(layout.pack_lowrank, down=False),
        ),
    }


def w4a16_fields(n: int, k: int, dtype: torch.dtype, *, chunks: int = 1, groups: int | None = None) -> dict[str, Field]:
    """The packed tensors of a modulation (N, K), the rows of its `chunks` interleaved.

    `groups` counts the rows of scales in the file: at least K / 64, where small layers are padded.
    """

    def unpack_codes(t: Tensor) -> Tensor:
        return UINT4.pack(layout.separate_rows(layout.unpack_w4a16_codes(t, n, k), chunks, 0))

    def pack_codes(t: Tensor) -> Tensor:
        return layout.pack_w4a16_codes(layout.interleave_rows(UINT4.unpack(t), chunks, 0))

    def unpack_scales(t: Tensor) -> Tensor:
        return layout.separate_rows(t[: k // GROUP_SIZE], chunks, 1)

    def pack_scales(t: Tensor) -> Tensor:
        return layout.interleave_rows(t, chunks, 1)

    rows = k // GROUP_SIZE if groups is None else groups
    return {
        "qweight": Field((n // 4, k // 2), torch.int32, unpack_codes, pack_codes),
        "wscales": Field((rows, n), dtype, unpack_scales, pack_scales),
        "wzeros": Field((rows, n), dtype, unpack_scales, pack_scales),
        "bias": Field(
            (n,),
            dtype,
            partial(layout.separate_rows, chunks=chunks, dim=0),
            partial(layout.interleave_rows, chunks=chunks, dim=0),
        ),
    }


def _svdq(linear: LinearPlan, rank: int, dtype: torch.dtype, dialect: Dialect) -> dict[str, PackedTensor]:
    module = _module_name(linear.name, dialect)
    return {
        f"{linear.name}.{name}": field.named(f"{module}.{_FIELDS[dialect].get(name, name)}")
        for name, field in svdq_fields(linear.out_features, linear.in_features, rank, dtype).items()
    }


def _w4a16(linear: LinearPlan, groups: int, dtype: torch.dtype) -> dict[str, PackedTensor]:
    n, k = linear.out_features, linear.in_features
    names = (
        (f"{linear.name}.{name}", field)
        for name, field in w4a16_fields(n, k, dtype, chunks=n // k, groups=groups).items()
    )
    return {name: field.named(name) for name, field in names}


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def unpacked(shape: tuple[int, ...], dtype: torch.dtype) -> Field:
    """A tensor that files hold as it is."""
    return Field(shape, dtype, _unchanged, _unchanged)


def packed_tensors(
    plan: ModelPlan,
    rank: int,
    dtype: torch.dtype,
    dialect: Dialect,
    copies: Spec,
    groups: Mapping[str, int] | None = None,
) -> dict[str, PackedTensor]:
    """Every tensor of a Nunchaku checkpoint by its native name.

    `copies` gives shapes of the 16-bit tensors by native name; `groups` the rows of scales of modulations that are
    padded in the file.
    """
    tensors: dict[str, PackedTensor] = {}
    for block in plan.blocks:
        for linear in block.linears:
            if linear.kind == "svdq":
                tensors |= _svdq(linear, rank, dtype, dialect)
            else:
                rows = (groups or {}).get(linear.name, linear.in_features // GROUP_SIZE)
                tensors |= _w4a16(linear, rows, dtype)
        for name, _ in block.copies:
            module, _, field = name.rpartition(".")
            shape = copies[name][0]
            tensors[name] = unpacked(shape, dtype).named(f"{_module_name(module, dialect)}.{field}")
    return tensors


class NunchakuTensors(Mapping[str, Tensor]):
    """A Nunchaku checkpoint's tensors by their native names, each unpacked when it is asked for.

    `copies` gives the shapes of what is not quantized, by native name. Raises CheckpointError, listing names, unless
    the files hold exactly the tensors of a FLUX transformer of these dimensions.
    """

    def __init__(self, source: TensorFiles, dims: FluxDims, copies: Spec, where: str) -> None:
        found = source.spec()
        self.rank = branch_rank(found, where)
        self.dialect = dialect = detect_dialect(found)
        dtypes = {dtype for name, (_, dtype) in found.items() if name.endswith(".wscales")}
        if any(dtype.is_floating_point and dtype.itemsize == 1 for dtype in dtypes):
            raise CheckpointError(f"{where}: is an NVFP4 checkpoint; take the INT4 one (svdq-int4)")
        plan = flux_plan(dims)
        groups = {
            linear.name: found[f"{linear.name}.wscales"][0][0]
            for linear in plan.linears()
            if linear.kind == "w4a16" and self._padded(found.get(f"{linear.name}.wscales"), linear)
        }
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.bfloat16
        self._packed = packed_tensors(plan, self.rank, dtype, dialect, copies, groups)
        expected = {p.name: (p.shape, p.dtype) for p in self._packed.values()}
        unused = {
            name: ((layout.padded(linear.in_features),), dtype)
            for linear in plan.linears()
            if (name := f"{_module_name(linear.name, dialect)}.{_UNUSED[dialect]}") in found
        }
        check(found, expected | unused, where)
        self._source = source

    @staticmethod
    def _padded(entry: tuple[tuple[int, ...], torch.dtype] | None, linear: LinearPlan) -> bool:
        groups = linear.in_features // GROUP_SIZE
        return entry is not None and entry[0][:1] == (layout.padded(groups, layout.MODULATION_SCALE_ROWS),)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, "cpu")

    def read(self, name: str, device: torch.device | str) -> Tensor:
        """One native tensor on `device`, unpacked there."""
        packed = self._packed[name]
        return packed.unpack(self._source.read(packed.name, device))

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def spec(self) -> Spec:
        """Shapes and dtypes of the native tensors: what unpacking the file's would give."""
        with torch.device("meta"):
            empty = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in self._packed.items()}
        made = {name: self._packed[name].unpack(tensor) for name, tensor in empty.items()}
        found = self._source.spec()
        return {
            name: (tuple(t.shape), found[self._packed[name].name][1] if t.is_floating_point() else t.dtype)
            for name, t in made.items()
        }
