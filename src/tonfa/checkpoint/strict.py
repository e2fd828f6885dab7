"""Comparing the tensors that are there with the tensors that are needed, before any is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from tonfa.errors import CheckpointError
from tonfa.weights import FLOAT_DTYPES

Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of tensors by name."""

_LISTED = 10
_LONGEST = 300


def nbytes(spec: Spec) -> int:
    """Bytes that these tensors fill."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec.values())


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def _fits(found: torch.dtype, expected: torch.dtype) -> bool:
    return found == expected or (found in FLOAT_DTYPES and expected in FLOAT_DTYPES)


def _line(kind: str, names: Iterable[str]) -> list[str]:
    """One line of the message, or none."""
    names = sorted(name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in names)
    if not names:
        return []
    more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return [f"  {len(names)} {kind}: {', '.join(names[:_LISTED])}{more}"]


def check(found: Spec, expected: Spec, where: str) -> None:
    """Raise one CheckpointError that lists every kind of difference, unless `found` is `expected`.

    bfloat16, float16 and float32 stand for each other; all other dtypes have to be equal.
    """
    common = found.keys() & expected.keys()
    shapes = [f"{n} {found[n][0]}, expected {expected[n][0]}" for n in common if found[n][0] != expected[n][0]]
    dtypes = [
        f"{n} {dtype_name(found[n][1])}, expected {dtype_name(expected[n][1])}"
        for n in common
        if not _fits(found[n][1], expected[n][1])
    ]
    lines = [
        *_line("missing", expected.keys() - found.keys()),
        *_line("unexpected", found.keys() - expected.keys()),
        *_line("of another shape", shapes),
        *_line("of another dtype", dtypes),
    ]
    if lines:
        remedy = "Is this the right folder, complete, and does its config.json belong to it?"
        raise CheckpointError("\n".join([f"{where}: tensors do not fit the model:", *lines, remedy]))


def check_one_float(found: Spec, where: str) -> None:
    """Raise CheckpointError unless all floating tensors have one dtype."""
    examples = {dtype: name for name, (_, dtype) in found.items() if dtype.is_floating_point}
    if len(examples) > 1:
        mix = ", ".join(f"{name} {dtype_name(dtype)}" for dtype, name in examples.items())
        raise CheckpointError(f"{where}: mixes floating dtypes ({mix}); quantize or convert it again")
