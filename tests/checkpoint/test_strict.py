"""One error that lists every kind of difference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tonfa.checkpoint.strict import check, check_one_float, nbytes
from tonfa.errors import CheckpointError

F, H, U = torch.float32, torch.bfloat16, torch.uint8


def test_equal_specs_pass_and_16_and_32_bit_floats_stand_for_each_other() -> None:
    check({"a": ((2, 3), F), "b": ((4,), U)}, {"a": ((2, 3), H), "b": ((4,), U)}, "here")


def test_all_differences_are_in_one_message() -> None:
    found = {"a": ((2, 3), F), "b": ((4,), torch.int8), "extra": ((), F), "d": ((1,), torch.float8_e4m3fn)}
    expected = {"a": ((3, 2), F), "b": ((4,), U), "gone": ((), F), "d": ((1,), H)}
    with pytest.raises(CheckpointError) as error:
        check(found, expected, "here")
    assert str(error.value).splitlines() == [
        "here: tensors do not fit the model:",
        "  1 missing: gone",
        "  1 unexpected: extra",
        "  1 of another shape: a (2, 3), expected (3, 2)",
        "  2 of another dtype: b int8, expected uint8, d float8_e4m3fn, expected bfloat16",
        "Is this the right folder, complete, and does its config.json belong to it?",
    ]


def test_long_lists_are_cut() -> None:
    with pytest.raises(CheckpointError, match=r"25 missing: t00, .*t09, and 15 more") as error:
        check({}, {f"t{i:02d}": ((), F) for i in range(25)}, "here")
    assert "t10" not in str(error.value)


@given(st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([((1,), F), ((1,), U), ((2,), F)])))
def test_a_spec_fits_itself_alone(spec: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    check(spec, dict(spec), "here")
    for name in spec:
        with pytest.raises(CheckpointError, match=f"missing: {name}"):
            check({k: v for k, v in spec.items() if k != name}, spec, "here")


def test_mixed_floats_are_named() -> None:
    check_one_float({"a": ((1,), H), "b": ((1,), U), "c": ((2,), H)}, "here")
    with pytest.raises(CheckpointError, match="mixes floating dtypes \\(a bfloat16, c float32\\)"):
        check_one_float({"a": ((1,), H), "b": ((1,), U), "c": ((2,), F)}, "here")


def test_bytes() -> None:
    assert nbytes({"a": ((2, 3), H), "b": ((), F), "c": ((0, 9), F)}) == 16
