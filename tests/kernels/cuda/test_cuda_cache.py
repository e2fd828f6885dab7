"""Compiled kernels on disk: whole, bounded, safe with many processes, and not needed."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tonfa.errors import KernelError
from tonfa.kernels.cuda import cache, kernel
from tonfa.kernels.cuda.product_gelu_quantize import add_kernel

SECONDS_TO_WAIT = 120


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


def test_no_files_but_ours_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 1000)
    folder.mkdir()
    for name in ("theirs.cu", "left by a killed process.tmp"):
        (folder / name).write_bytes(bytes(2000))
        os.utime(folder / name, (1, 1))
    (folder / "theirs").mkdir()
    cache.write("a", bytes(500))
    assert sorted(p.name for p in folder.iterdir()) == ["a.kernel", "theirs", "theirs.cu"]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were compiled, by a compiler that is none."""
    names = []

    def compile_cubin(name, source, headers, options, architecture):
        names.append(name)
        return f"code for {architecture}".encode()

    monkeypatch.setattr(kernel, "compile_cubin", compile_cubin)
    monkeypatch.setattr(kernel, "compiler_version", lambda: "13.0")
    return names


@pytest.mark.parametrize(
    ("file", "reason"), [("caches", "Not a directory"), ("caches/kernels", "it is no folder")], ids=["above", "itself"]
)
def test_kernels_are_built_where_a_file_is_in_the_way(
    file: str,
    reason: str,
    tmp_path: Path,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TONFA_CACHE_DIR", str(tmp_path / "caches"))
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    check_nothing_is_kept(tmp_path / "caches" / "kernels", reason, compiled, caplog)


def check_nothing_is_kept(
    folder: Path | str, reason: str, compiled: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        results = [kernel.build(add_kernel(), a) for a in (80, 86, 80)]
    assert results == [(b"code for 80", False), (b"code for 86", False), (b"code for 80", False)]
    assert len(compiled) == 3
    assert len(caplog.records) == 1 and f"cannot be kept in {folder} ({reason})" in caplog.text
    assert "Set TONFA_CACHE_DIR" in caplog.text


def test_kernels_are_built_beside_a_read_only_folder(
    folder: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whose kernels are read. Root may write to any folder, so the refusal is made up."""

    def refuse(dir: Path, suffix: str) -> tuple[int, str]:
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/{len(os.urandom(4))}{suffix}")

    assert kernel.build(add_kernel(), 90) == (b"code for 90", False)
    compiled.clear()
    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(os, "utime", lambda path: refuse(path, ""))
    assert kernel.build(add_kernel(), 90) == (b"code for 90", True)
    check_nothing_is_kept(folder, "Permission denied", compiled, caplog)


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: b"", lambda c: bytes(len(c)), lambda c: c + b"x"])
def test_a_damaged_kernel_is_built_again(damage, folder: Path, compiled: list[str]) -> None:
    kernel.build(add_kernel(), 80)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert [kernel.build(add_kernel(), 80) for _ in range(2)] == [(b"code for 80", False), (b"code for 80", True)]
    assert len(compiled) == 2


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


def _build(folder: str, together: threading.Barrier) -> tuple[bytes, bool]:
    os.environ["TONFA_CACHE_DIR"] = folder

    def compile_cubin(name: str, *_: object) -> bytes:
        together.wait(SECONDS_TO_WAIT)  # none is done before all have begun
        return name.encode() * 100_000

    kernel.compile_cubin, kernel.compiler_version = compile_cubin, lambda: "13.0"
    return kernel.build(add_kernel(), 80)


def test_many_processes_build_the_same_kernel_at_once(folder: Path, compiled: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(3) as pool:
        together = manager.Barrier(3)
        built = pool.starmap(_build, [(str(folder.parent), together)] * 3, chunksize=1)
    code = b"add_partials[]" * 100_000
    assert built == [(code, False)] * 3
    assert kernel.build(add_kernel(), 80) == (code, True) and not compiled
    assert len(list(folder.iterdir())) == 1


def test_a_kernel_is_compiled_once_for_each_architecture(compiled: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = [kernel.build(add_kernel(), a) for a in (80, 86, 80, 86)]
    assert results == [(b"code for 80", False), (b"code for 86", False), (b"code for 80", True), (b"code for 86", True)]
    monkeypatch.setattr(kernel, "compiler_version", lambda: "13.1")
    assert kernel.build(add_kernel(), 80) == (b"code for 80", False)
    assert compiled == ["add_partials[]"] * 3


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


@pytest.fixture
def without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a user whom no list of users names, and HOME neither, has among the temporary files."""

    def none_such(user: int) -> None:
        raise KeyError(user)

    for name in ("TONFA_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", none_such)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(RuntimeError):
        Path.home()
    return tmp_path / f"tonfa-{os.geteuid()}"


def test_users_without_a_home_have_a_folder_of_their_own(without_a_home: Path, compiled: list[str]) -> None:
    assert [kernel.build(add_kernel(), 80)[1] for _ in range(2)] == [False, True]
    assert without_a_home.stat().st_mode & 0o777 == 0o700
    assert cache.directory() == without_a_home / "kernels" and len(list(cache.directory().iterdir())) == 1


@pytest.mark.parametrize("whose", ["another user's", "a group's", "a link", "a file"])
def test_no_kernel_is_taken_from_anyone_else(
    whose: str,
    without_a_home: Path,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nor written where others could change it."""
    kernel.build(add_kernel(), 80)
    compiled.clear()
    folder, elsewhere = without_a_home, without_a_home.parent / "elsewhere"
    if whose == "another user's":
        uid = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: uid)
        folder = without_a_home.rename(without_a_home.parent / f"tonfa-{uid}")
    elif whose == "a group's":
        folder.chmod(0o770)
    elif whose == "a link":
        folder.symlink_to(folder.rename(elsewhere))
    else:
        folder.rename(elsewhere)
        folder.touch(0o600)
    reason = f"there is no home folder, and {folder} is not this user's alone"
    check_nothing_is_kept("the folder for caches", reason, compiled, caplog)


def test_a_setting_that_names_a_missing_home_is_refused(without_a_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TONFA_CACHE_DIR", "~/caches")
    with pytest.raises(KernelError, match="TONFA_CACHE_DIR=~/caches: there is no such home folder; give a full path"):
        kernel.build(add_kernel(), 80)
