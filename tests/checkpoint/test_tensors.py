"""Reading folders of safetensors: lazily, sharded or not, and every way in which they can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tonfa.checkpoint.tensors import TensorFolder, open_file, read_json
from tonfa.errors import CheckpointError

ONE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
TENSORS = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.uint8), "c.d": torch.ones((), dtype=torch.bfloat16)}


def write_sharded(folder: Path, index: str = INDEX) -> dict[str, str]:
    weight_map = {"a": "x-1.safetensors", "b": "x-1.safetensors", "c.d": "x-2.safetensors"}
    for file in set(weight_map.values()):
        save_file({n: TENSORS[n] for n, f in weight_map.items() if f == file}, folder / file)
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def assert_holds(folder: TensorFolder, tensors: dict[str, Tensor]) -> None:
    assert len(folder) == len(tensors)
    assert folder.keys() == tensors.keys()
    assert folder.spec() == {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(folder[name], tensor)


@pytest.mark.parametrize(
    "name", [ONE, "model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.bf16.safetensors"]
)
def test_one_file(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / name)
    assert_holds(TensorFolder(tmp_path), TENSORS)


@pytest.mark.parametrize(
    "index", [INDEX, "model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.fp16.json"]
)
def test_shards(tmp_path: Path, index: str) -> None:
    write_sharded(tmp_path, index)
    assert_holds(TensorFolder(tmp_path), TENSORS)


def test_a_variant_is_taken_only_where_there_is_no_other(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    save_file(TENSORS, tmp_path / ONE)
    assert_holds(TensorFolder(tmp_path), TENSORS)


def test_an_unknown_name_is_a_key_error(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / ONE)
    folder = TensorFolder(tmp_path)
    assert "nope" not in folder
    with pytest.raises(KeyError, match="nope"):
        folder["nope"]


def test_identity_changes_with_the_files(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    before = TensorFolder(tmp_path).identity()
    assert [entry[0] for entry in before] == ["x-1.safetensors", "x-2.safetensors"]
    assert TensorFolder(tmp_path).identity() == before
    save_file({"c.d": torch.zeros((), dtype=torch.bfloat16)}, tmp_path / "x-2.safetensors")
    assert TensorFolder(tmp_path).identity() != before


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "x-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"x-2\.safetensors: no such file"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    "file", ["../x-1.safetensors", "/etc/x.safetensors", "sub/x-1.safetensors", "a\\x.safetensors", "x.bin", 3, None]
)
def test_paths_out_of_the_folder_are_refused(tmp_path: Path, file: object) -> None:
    weight_map = write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "a": file}}))
    with pytest.raises(CheckpointError, match="a is in .* no safetensors file of this folder"):
        TensorFolder(tmp_path)


def test_a_nameless_tensor_does_not_stand_for_a_whole_file(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"": "x-1.safetensors"}}))
    with pytest.raises(CheckpointError, match="a tensor without a name"):
        TensorFolder(tmp_path)


def test_an_index_that_leads_nowhere_is_not_passed_over(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / ONE)
    (tmp_path / INDEX).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"index\.json: is a link to nowhere, which does not exist"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("weight_map", [{"b": None}, {"extra": "x-2.safetensors"}], ids=["unlisted", "absent"])
def test_index_and_shards_have_to_agree(tmp_path: Path, weight_map: dict[str, str | None]) -> None:
    merged = {k: v for k, v in {**write_sharded(tmp_path), **weight_map}.items() if v is not None}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": merged}))
    with pytest.raises(CheckpointError, match=f"does not agree with its index about {next(iter(weight_map))}"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "\xff"])
def test_damaged_indices_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no diffusion_pytorch_model.safetensors"),
        (["diffusion_pytorch_model.bin"], "pickled weights are not read"),
        (["flux1-dev.safetensors"], "other layouts"),
        (["transformer/config.json"], "take its subfolder 'transformer'"),
    ],
)
def test_folders_without_weights_say_why(tmp_path: Path, files: list[str], message: str) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        TensorFolder(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        TensorFolder(tmp_path / "nowhere")


def test_a_folder_in_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / ONE).mkdir()
    with pytest.raises(CheckpointError, match="is no file"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("cut", [1, 40, 100, -1])
def test_truncated_files(tmp_path: Path, cut: int) -> None:
    path = tmp_path / ONE
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is truncated or damaged"):
        TensorFolder(tmp_path)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "truncated or damaged"),
        (b"garbage, garbage", "truncated or damaged"),
        ((50).to_bytes(8, "little") + b"x" * 50, "truncated or damaged"),
        (b"PK\x03\x04" + bytes(100), "zip archive"),
        (b"\x80\x02}q\x00." + bytes(100), "a pickle"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_other_files_are_recognized(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / ONE).write_bytes(content)
    with pytest.raises(CheckpointError, match=kind):
        TensorFolder(tmp_path)


def test_a_renamed_pickle_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / ONE)
    with pytest.raises(CheckpointError, match="zip archive, probably a pickled"):
        TensorFolder(tmp_path)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / ONE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    with pytest.raises(CheckpointError, match="a has dtype F4"):
        TensorFolder(tmp_path)


def test_open_file_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: no such file"):
        open_file(tmp_path / "x.safetensors")


def test_read_json_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(CheckpointError, match="no such file"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object, got list"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
