"""Options whose values are a few names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tonfa.errors import UnsupportedError

Choice = TypeVar("Choice", bound=str)


def parse(option: str, value: str, known: Iterable[Choice]) -> Choice:
    """The one of the known names that `value` is; raises UnsupportedError, listing them, if it is none."""
    names = list(known)
    for name in names:
        if name == value:
            return name
    raise UnsupportedError(f"{option}={value!r} is unknown; choose one of {', '.join(names)}")
