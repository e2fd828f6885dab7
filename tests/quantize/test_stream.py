"""From disk to disk: the same bits as in memory, resumed after any stop, nothing half-written, little in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_flux import PLAN, CountingSource, dense_config, save_dense
from safetensors.torch import load_file, save_file
from torch import Tensor

from support import DEVICES
from tonfa.checkpoint import atomic, native, shards
from tonfa.checkpoint.tensors import TensorFolder
from tonfa.errors import CheckpointError, FormatError, UnsupportedError
from tonfa.quantizer import stream
from tonfa.quantizer.planned import materialize
from tonfa.quantizer.recipe import Recipe
from tonfa.quantizer.stream import Report, quantize_checkpoint

RECIPE = Recipe(16, iterations=1)
LINEARS = [linear.name for linear in PLAN.linears()]
SHARD = "300KB"
"""Three shards: the outer tensors, the double block, the single block."""


def quantize(dense: Path, out: Path, recipe: Recipe = RECIPE, **options: Any) -> Report:
    source = options.pop("source", None) or TensorFolder(dense)
    options = {"max_shard_size": SHARD, **options}
    return quantize_checkpoint(source, PLAN, dense_config(dense), out, recipe, **options)


@pytest.fixture(scope="module")
def expected(dense: Path) -> dict[str, Tensor]:
    return materialize(PLAN, dict(TensorFolder(dense)), RECIPE)


@pytest.fixture(scope="module")
def target(expected: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (tuple(t.shape), t.dtype) for name, t in expected.items()}


@pytest.fixture
def own(dense: Path, tmp_path: Path) -> Path:
    """A dense model that a test may damage."""
    return shutil.copytree(dense, tmp_path / "own")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def stop_at(name: str, error: BaseException) -> Callable[[str, int, int], None]:
    def progress(linear: str, done: int, total: int) -> None:
        if linear == name:
            raise error

    return progress


@pytest.mark.parametrize("size", ["1GB", SHARD])
def test_equal_to_the_bit_with_quantizing_in_memory(
    dense: Path, tmp_path: Path, expected: dict[str, Tensor], target: dict[str, Any], size: str
) -> None:
    calls: list[tuple[str, int, int]] = []
    report = quantize(
        dense, tmp_path / "new" / "out", max_shard_size=size, target=target, progress=lambda *call: calls.append(call)
    )
    out = tmp_path / "new" / "out"
    found = native.load(out, target)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert calls == [(name, i + 1, len(LINEARS)) for i, name in enumerate(LINEARS)]
    assert list(report.errors) == LINEARS
    assert all(0.02 < error < 0.1 for error in report.errors.values())
    assert report.bytes_in == sum(t.nbytes for t in TensorFolder(dense).values())
    assert report.bytes_out == sum(t.nbytes for t in expected.values())
    assert report.seconds > 0
    assert report.resumed == 0
    count = 1 if size == "1GB" else 3
    index = [] if count == 1 else [shards.INDEX]
    assert sorted(p.name for p in out.iterdir()) == sorted(["config.json", *index, *shards.shard_names(count)])
    assert [p.name for p in out.parent.iterdir()] == ["out"]


def test_config_is_the_dense_one_and_says_how_it_was_made(dense: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "out")
    config = native.read_config(tmp_path / "out")
    quantization = config.pop("quantization_config")
    assert quantization == {
        "quant_method": "tonfa",
        "format_version": 1,
        "precision": "int4",
        "group_size": 64,
        "rank": 16,
        "recipe": asdict(RECIPE),
    }
    original = {k: v for k, v in dense_config(dense).items() if k != "_name_or_path"}
    assert config == {**original, "_class_name": "SVDQFluxTransformer2DModel"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_and_devices(tmp_path: Path, dtype: torch.dtype, device: str) -> None:
    save_dense(tmp_path / "dense", torch.float32)
    report = quantize(tmp_path / "dense", tmp_path / "out", dtype=dtype, device=device)
    spec = TensorFolder(tmp_path / "out").spec()
    assert {entry[1] for entry in spec.values()} == {dtype, torch.uint8}
    assert all(0.02 < error < 0.1 for error in report.errors.values())


@pytest.mark.parametrize("error", [RuntimeError("stopped"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("name", [LINEARS[0], LINEARS[9], LINEARS[12], LINEARS[-1]])
def test_resumes_where_it_was_stopped(dense: Path, tmp_path: Path, name: str, error: BaseException) -> None:
    quantize(dense, tmp_path / "whole")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with pytest.raises(type(error)):
        quantize(dense, out, progress=stop_at(name, error))
    assert not out.exists()
    assert not list(partial.rglob("*.tmp"))
    done = LINEARS.index(name) // 10 * 10  # the double block's shard has ten linears
    source, calls = CountingSource(dense), []
    report = quantize(dense, out, source=source, progress=lambda *call: calls.append(call))
    assert files(out) == files(tmp_path / "whole")
    assert report.resumed == done
    assert list(report.errors) == LINEARS
    assert [call[1] for call in calls] == list(range(done + 1, len(LINEARS) + 1))
    assert any(read.startswith("transformer_blocks") for read in source.reads) == (done == 0)
    assert not partial.exists()


def test_a_link_to_a_folder_is_followed(dense: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "whole")
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    with pytest.raises(KeyboardInterrupt):
        quantize(dense, tmp_path / "link", progress=stop_at(LINEARS[12], KeyboardInterrupt()))
    assert (tmp_path / "disk" / "out.partial").is_dir()
    assert quantize(dense, tmp_path / "link").resumed == 10
    assert (tmp_path / "link").is_symlink() and files(tmp_path / "link") == files(tmp_path / "whole")
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["out"]


def test_resumes_after_any_failed_write(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename in turn is the one that a stop prevents; the next run finishes with the same bytes."""
    quantize(dense, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    replace = Path.replace

    def failing(after: int) -> Callable[[Path, Path], Path]:
        remaining = iter(range(after))

        def stop(self: Path, to: Path) -> Path:
            if next(remaining, None) is None:
                raise KeyboardInterrupt
            return replace(self, to)

        return stop

    for after in range(20):
        out = tmp_path / f"out{after}"
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", failing(after))
            try:
                quantize(dense, out)
            except KeyboardInterrupt:
                stopped = True
            else:
                stopped = False
        if stopped:
            assert not out.exists()
            assert not list(tmp_path.rglob("*.tmp"))
            quantize(dense, out)
        assert files(out) == whole
        if not stopped:
            break
    assert 5 < after < 19


def test_a_damaged_or_missing_shard_is_made_again(dense: Path, tmp_path: Path) -> None:
    quantize(dense, tmp_path / "whole")
    for damage in (lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.write_bytes(b"")):
        out = tmp_path / "out"
        with pytest.raises(KeyboardInterrupt):
            quantize(dense, out, progress=stop_at(LINEARS[-1], KeyboardInterrupt()))
        damage(tmp_path / "out.partial" / "checkpoint" / shards.shard_names(3)[1])
        assert quantize(dense, out).resumed == 0
        assert files(out) == files(tmp_path / "whole")
        shutil.rmtree(out)


@pytest.fixture
def interrupted(dense: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(dense, out, progress=stop_at(LINEARS[-1], KeyboardInterrupt()))
    return out


def test_two_runs_at_a_time_do_not_mix(dense: Path, tmp_path: Path, expected: dict[str, Tensor]) -> None:
    refused = []

    def progress(linear: str, done: int, total: int) -> None:
        if done in (1, total):
            for options in ({}, {"recipe": Recipe(16, 1, seed=1)}, {"overwrite": True}):
                with pytest.raises(CheckpointError, match=r"out\.partial: another run is at work in it"):
                    quantize(dense, tmp_path / "out", **options)
                refused.append(done)

    report = quantize(dense, tmp_path / "out", progress=progress)
    assert len(refused) == 6 and report.resumed == 0
    made = TensorFolder(tmp_path / "out")
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"recipe": Recipe(32, 1)}, "another recipe is"),
        ({"recipe": Recipe(16, 1, seed=1)}, "another recipe is"),
        ({"dtype": torch.float16}, "another dtype "),
        ({"max_shard_size": "500KB"}, "another shard size "),
    ],
)
def test_other_settings_do_not_continue_a_run(
    dense: Path, interrupted: Path, options: dict[str, Any], changed: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"out\.partial: an unfinished run with {changed}.*discard"):
        quantize(dense, interrupted, **options)
    assert quantize(dense, interrupted, overwrite=True, **options).resumed == 0
    assert not interrupted.with_name("out.partial").exists()


def test_a_changed_source_does_not_continue_a_run(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(own, out, progress=stop_at(LINEARS[-1], KeyboardInterrupt()))
    change(own, lambda t: t["x_embedder.bias"].add_(1))
    with pytest.raises(CheckpointError, match="another source "):
        quantize(own, out)


def test_a_run_without_finished_shards_is_no_obstacle(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(dense, tmp_path / "out", progress=stop_at(LINEARS[0], KeyboardInterrupt()), max_shard_size="1GB")
    assert quantize(dense, tmp_path / "out", Recipe(32, 0)).resumed == 0


@pytest.mark.parametrize("name", ["notes.txt", "manifest.json"])
def test_a_foreign_partial_folder_is_left_alone(dense: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"out\.partial: is in the way"):
        quantize(dense, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out.partial") == {name: b"{}"}


def test_an_existing_output_is_replaced_only_on_request(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(dense, out)
    before = files(out)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize(dense, out, Recipe(32, 0))
    assert files(out) == before
    quantize(dense, out, Recipe(32, 0), overwrite=True, max_shard_size="1GB")
    assert native.read_config(out)["quantization_config"]["rank"] == 32
    assert sorted(files(out)) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_source_is_never_the_output(own: Path) -> None:
    before = files(own)
    with pytest.raises(CheckpointError, match="is the source itself"):
        quantize(own, own, overwrite=True)
    assert files(own) == before


NAME = "single_transformer_blocks.0.attn.to_k.weight"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(NAME), rf"1 missing: {NAME}"),
        (lambda t: t.pop("norm_out.linear.bias"), "1 missing: norm_out.linear.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 unexpected: extra"),
        (lambda t: t.update({NAME: t[NAME][:-1].clone()}), rf"{NAME} \(127, 128\), expected \(128, 128\)"),
        (lambda t: t.update({NAME: t[NAME].to(torch.float8_e4m3fn)}), rf"{NAME} float8_e4m3fn, expected"),
        (
            lambda t: t.update({"x_embedder.weight": torch.zeros(128, 64)}),
            r"x_embedder.weight \(128, 64\), expected \(128, 128\)",
        ),
    ],
    ids=["missing", "missing copy", "extra", "misshapen", "wrong dtype", "misshapen copy"],
)
def test_a_source_that_does_not_fit_is_refused_before_anything_is_made(
    own: Path, tmp_path: Path, target: dict[str, Any], edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    change(own, edit)
    with pytest.raises(CheckpointError, match=message):
        quantize(own, tmp_path / "out", target=target)
    assert [p.name for p in tmp_path.iterdir()] == ["own"]


@pytest.mark.parametrize(
    ("name", "named"),
    [(NAME, "single_transformer_blocks.0.attn.to_qkv.weight"), ("x_embedder.bias", "x_embedder.bias")],
)
def test_values_that_are_not_finite_are_named(own: Path, tmp_path: Path, name: str, named: str) -> None:
    change(own, lambda t: t[name].view(-1)[3].fill_(torch.nan))
    with pytest.raises(FormatError, match=f"{named}: holds NaN"):
        quantize(own, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_target_of_another_model_is_refused(dense: Path, tmp_path: Path, target: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="1 missing: other"):
        quantize(dense, tmp_path / "out", target={**target, "other": ((1,), torch.bfloat16)})


def test_a_quantized_source_is_refused(dense: Path, tmp_path: Path) -> None:
    config = {**dense_config(dense), "quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize_checkpoint(TensorFolder(dense), PLAN, config, tmp_path / "out", RECIPE)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dtype": torch.int8}, "dtype int8"), ({"max_shard_size": "much"}, "shard size 'much'")],
)
def test_unsupported_options(dense: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        quantize(dense, tmp_path / "out", **options)


def test_too_little_space_is_noticed_before_the_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    source = CountingSource(dense)
    with pytest.raises(CheckpointError, match=r"\d\.\d MB have to be written and 2\.0 MB are free; free some space"):
        quantize(dense, tmp_path / "out", source=source)
    assert source.reads == []


def test_a_full_disk_is_named_and_leaves_no_half_written_file(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(CheckpointError, match="no space left on the disk"):
        patch.setattr(atomic.os, "fsync", full)
        quantize(dense, tmp_path / "out")
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_one_linear_of_the_source_is_in_memory_at_a_time(dense: Path, tmp_path: Path) -> None:
    source = CountingSource(dense)
    quantize(dense, tmp_path / "out", source=source)
    spec = source.spec()
    largest = max(
        sum(torch.Size(spec[f"{name}.{kind}"][0]).numel() * 2 for name in linear.sources for kind in ("weight", "bias"))
        for linear in PLAN.linears()
    )
    outer = sum(torch.Size(spec[name][0]).numel() * 2 for _, name in PLAN.blocks[0].copies)
    assert source.most <= largest + outer
    assert set(source.reads) == set(spec)


def test_manifest_is_readable(interrupted: Path) -> None:
    manifest = json.loads((interrupted.with_name("out.partial") / "manifest.json").read_text())
    assert list(manifest["errors"]) == shards.shard_names(3)[:2]
    assert manifest["fingerprint"]["recipe"] == asdict(RECIPE)
