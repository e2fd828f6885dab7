"""Compiled kernels on disk: whole, bounded, safe with many processes, and not needed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tonfa.kernels.cuda import cache, kernel
from tonfa.kernels.cuda.product_gelu_quantize import add_kernel


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TONFA_CACHE_DIR", str(tmp_path))
    yield tmp_path / "kernels"
    cache._warn_once.cache_clear()


def test_what_was_written_is_read(folder: Path) -> None:
    name = cache.key("a", "b")
    assert cache.read(name) is None
    cache.write(name, b"code")
    assert cache.read(name) == b"code"
    assert [p.name for p in folder.iterdir()] == [name + ".kernel"]


def test_keys_depend_on_every_part_and_where_it_ends() -> None:
    keys = [cache.key(*parts) for parts in (("ab", "c"), ("a", "bc"), ("abc",), ("ab", "c", ""), ("ab", "d"))]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: c[:10], lambda c: b"", lambda c: c[:-1] + b"x"])
def test_damaged_files_are_not_used(damage, folder: Path) -> None:
    cache.write("name", b"code")
    path = folder / "name.kernel"
    path.write_bytes(damage(path.read_bytes()))
    assert cache.read("name") is None
    cache.write("name", b"code")
    assert cache.read("name") == b"code"


def test_the_least_recently_used_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 3 * (1000 + 32))
    for age, name in enumerate("abc"):
        cache.write(name, bytes(1000))
        os.utime(folder / f"{name}.kernel", (age, age))
    assert cache.read("a") is not None  # used again
    cache.write("d", bytes(1000))
    assert sorted(p.stem for p in folder.iterdir()) == ["a", "c", "d"]


def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TONFA_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        cache.write("a", b"code")
        cache.write("b", b"code")
    assert len(caplog.records) == 1 and "Set TONFA_CACHE_DIR" in caplog.text and str(tmp_path / "file") in caplog.text
    assert cache.read("a") is None


def test_a_write_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    cache.write("a", b"code")
    assert list(folder.iterdir()) == []


def _write_and_read(folder: str, number: int) -> bool:
    os.environ["TONFA_CACHE_DIR"] = folder
    for i in range(50):
        code = bytes([i % 5]) * 20000
        cache.write(str(i % 5), code)
        found = cache.read(str((i + number) % 5))
        if found is not None and found != bytes([(i + number) % 5]) * 20000:
            return False
    return True


def test_many_processes_share_it(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert all(pool.starmap(_write_and_read, [(str(tmp_path), n) for n in range(3)]))
    assert not list((tmp_path / "kernels").glob("*.tmp"))


def test_a_kernel_is_compiled_once_for_each_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_cubin(name, source, headers, options, architecture):
        compiled.append((name, architecture))
        return f"code for {architecture}".encode()

    monkeypatch.setattr(kernel, "compile_cubin", compile_cubin)
    monkeypatch.setattr(kernel, "compiler_version", lambda: "13.0")
    results = [kernel.build(add_kernel(), a) for a in (80, 86, 80, 86)]
    assert results == [(b"code for 80", False), (b"code for 86", False), (b"code for 80", True), (b"code for 86", True)]
    monkeypatch.setattr(kernel, "compiler_version", lambda: "13.1")
    assert kernel.build(add_kernel(), 80) == (b"code for 80", False)
    assert compiled == [("add_partials[]", a) for a in ("80", "86", "80")]


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/tonfa/kernels"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/u/.cache/tonfa/kernels"),
        ("darwin", {}, "/home/u/Library/Caches/tonfa/kernels"),
        ("win32", {"LOCALAPPDATA": "/l"}, "/l/tonfa/kernels"),
    ],
)
def test_each_platform_has_its_place(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TONFA_CACHE_DIR")
    monkeypatch.setenv("HOME", "/home/u")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert cache.directory() == Path(expected)
