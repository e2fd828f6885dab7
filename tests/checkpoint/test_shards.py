"""Written files are what the safetensors package reads; groups and names of shards."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from tonfa.checkpoint.shards import (
    INDEX,
    group_by_size,
    parse_size,
    shard_names,
    write_index,
    write_tensors,
)
from tonfa.checkpoint.tensors import DTYPES
from tonfa.errors import CheckpointError, UnsupportedError


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 2)])
def test_every_dtype_and_shape_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    write_tensors(tmp_path / "x.safetensors", {"a.b": tensor})
    found = load_file(tmp_path / "x.safetensors")["a.b"]
    assert (found.dtype, found.shape) == (dtype, tensor.shape)
    assert torch.equal(found.view(torch.uint8) if shape else found, tensor.view(torch.uint8) if shape else tensor)


def test_views_shared_and_trained_tensors_come_back(tmp_path: Path) -> None:
    base = torch.randn(6, 8, requires_grad=True)
    tensors = {"rows": base[2:4], "transposed": base.T, "same": base, "bytes": torch.arange(3, dtype=torch.uint8)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_tensors_start_aligned_and_the_file_says_pt(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(7)}
    write_tensors(path, tensors)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_dtype_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a: complex64 cannot be written"):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_names() -> None:
    assert shard_names(1) == ["diffusion_pytorch_model.safetensors"]
    assert shard_names(12)[10] == "diffusion_pytorch_model-00011-of-00012.safetensors"


def test_an_index_names_every_tensor_once(tmp_path: Path) -> None:
    shards = {"1": {"a": ((2, 3), torch.bfloat16)}, "2": {"b": ((4,), torch.uint8), "c": ((), torch.float32)}}
    write_index(tmp_path, shards)
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_size": 20},
        "weight_map": {"a": "1", "b": "2", "c": "2"},
    }


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    write_index(tmp_path, {"1": {"a": ((2, 3), torch.bfloat16)}})
    assert list(tmp_path.iterdir()) == []


@given(st.lists(st.integers(0, 100), min_size=1), st.integers(1, 150))
def test_groups_are_neighbors_within_the_limit(sizes: list[int], limit: int) -> None:
    groups = group_by_size([{"x": ((size,), torch.uint8)} for size in sizes], limit)
    assert [i for group in groups for i in group] == list(range(len(sizes)))
    for group in groups:
        assert sum(sizes[i] for i in group) <= limit or len(group) == 1
    for group, following in pairwise(groups):
        assert sum(sizes[i] for i in group) + sizes[following[0]] > limit


@pytest.mark.parametrize(
    ("text", "size"), [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2**31), ("3kib", 3072)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "0", "1TB5", "1 XB", "much", 0, -5])
def test_bad_sizes_are_refused(text: int | str) -> None:
    with pytest.raises(UnsupportedError, match="shard size"):
        parse_size(text)
