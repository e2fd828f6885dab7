"""Damaged checkpoints: each is refused with one clear error, or loads as the very tensors of the whole one."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from damage import CONTAINERS, INDEX, damaged_copy, make_checkpoints

from tonfa import SVDQFluxTransformer2DModel
from tonfa.errors import CheckpointError
from tonfa.models.flux.audit import inspect_checkpoint, verify_checkpoint
from tonfa.models.flux.export import export, read_quantized

CASES = {"native": 90, "sharded": 100, "legacy": 90, "single": 30}
"""Of each seed: 8 times 280 damaged folders and 8 times 30 damaged files."""

EVERY = 10
"""One case of these many is also inspected, verified and converted."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_checkpoints(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(checkpoints: dict[str, Path]) -> dict[str, torch.Tensor]:
    states = [SVDQFluxTransformer2DModel.from_pretrained(path).state_dict() for path in checkpoints.values()]
    assert all(equal(state, states[0]) for state in states)
    return states[0]


@pytest.fixture(autouse=True)
def _nothing_is_unpickled(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, fail)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.dtype == b[n].dtype and torch.equal(t, b[n]) for n, t in a.items())


def refusal(path: Path) -> str | None:
    """The error's text if the other ways of reading refuse the checkpoint; `verify` may report instead."""
    out = path.with_name("converted")
    try:
        export(read_quantized(path), out, "native", overwrite=True)
    except CheckpointError as error:
        assert verdict(path) is not True
        assert not out.exists()
        return str(error)
    assert verdict(path) is True
    inspect_checkpoint(path)
    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    return None


def verdict(path: Path) -> bool | None:
    try:
        return bool(verify_checkpoint(path)["ok"])
    except CheckpointError:
        return None


@pytest.mark.timeout(100)
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("seed", range(8))
def test_damage_is_refused_by_name_or_harmless(
    checkpoints: dict[str, Path], whole: dict[str, torch.Tensor], container: str, seed: int, tmp_path: Path
) -> None:
    rng = random.Random(f"{container} {seed}")
    source = checkpoints[container]
    path = tmp_path / "at" / source.name
    path.parent.mkdir()
    refused = 0
    for case in range(CASES[container]):
        done = damaged_copy(rng, source, path)
        try:
            loaded = SVDQFluxTransformer2DModel.from_pretrained(path).state_dict()
        except CheckpointError as error:
            message = str(error)
            assert str(path) in message, (done, message)
            assert all(part in message for part in done.named), (done, message)
            assert all(c.isprintable() or c == "\n" for c in message), (done, message)
            assert len(message) < 12_000, done
            refused += 1
        else:
            assert not done.refused, done
            assert equal(loaded, whole), done
            message = None
        if case % EVERY == 0:
            assert (refusal(path) is None) == (message is None), (done, message)
    assert refused > CASES[container] * 0.6


LIMITED = """
import re, resource, sys
from pathlib import Path
from tonfa import SVDQFluxTransformer2DModel
from tonfa.errors import CheckpointError

used = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
for path in sys.argv[1:]:
    try:
        SVDQFluxTransformer2DModel.from_pretrained(path)
    except CheckpointError as error:
        assert path in str(error), error
        print("refused")
"""
"""Loads each of its arguments with 256 MiB to spare, of which a checkpoint of this test needs less than one."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
@pytest.mark.timeout(100)
def test_memory_stays_within_what_the_files_warrant(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def copy(container: str, name: str) -> Path:
        source = checkpoints[container]
        target = tmp_path / name
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    def change(folder: Path, file: str, before: str, after: str) -> Path:
        text = (folder / file).read_text()
        assert before in text
        (folder / file).write_text(text.replace(before, after, 1))
        return folder

    weights, blocks = "diffusion_pytorch_model.safetensors", "transformer_blocks.safetensors"
    paths = [
        change(copy("native", "layers"), "config.json", '"num_layers": 1', '"num_layers": 256'),
        change(copy("native", "width"), "config.json", '"num_attention_heads": 1', '"num_attention_heads": 4096'),
        change(copy("native", "rank"), "config.json", '"rank": 16', '"rank": 1000000000'),
        change(copy("legacy", "wide"), "config.json", '"joint_attention_dim": 32', '"joint_attention_dim": 131072'),
    ]
    for container, file in (("native", "config.json"), ("native", weights), ("legacy", blocks), ("sharded", INDEX)):
        path = copy(container, f"large-{container}-{file}")
        with (path / file).open("r+b") as sparse:
            sparse.truncate(2**36)
        paths.append(path)
    path = copy("native", "endless")
    (path / "config.json").unlink()
    (path / "config.json").symlink_to("/dev/zero")
    paths.append(path)
    path = copy("sharded", "brackets")
    (path / INDEX).write_bytes(b'{"weight_map": [' + b"[]," * 2**22)
    paths.append(path)

    command = [sys.executable, "-c", LIMITED, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["refused"] * len(paths)
