"""Help, version and the exit codes that all commands share."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import entry_points
from typing import get_args

import pytest
import torch

from tonfa import __version__
from tonfa.cli.app import main
from tonfa.cli.console import duration, size
from tonfa.cli.options import parse_device
from tonfa.errors import UnsupportedError

COMMANDS = ("generate", "quantize", "evaluate", "doctor")


def test_entry_point() -> None:
    (script,) = entry_points(group="console_scripts", name="tonfa")
    assert script.load() is main


def test_version(tonfa) -> None:
    result = tonfa("--version")
    assert (result.exit_code, result.stdout) == (0, f"tonfa {__version__}\n")


def test_help_lists_the_commands(tonfa) -> None:
    result = tonfa("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_description_and_an_example(tonfa, command: str) -> None:
    text = re.sub(r"\x1b\[[0-9;]*m", "", tonfa(command, "--help").stdout)
    assert re.search(r"Example:\s+tonfa " + command, text)
    options = [line for line in text.splitlines() if re.match(r"│ \*? +--|│ --", line)]
    assert options and all(re.search(r"  \S.*│$", line) for line in options)


@pytest.mark.parametrize("arguments", [("nonsense",), ("generate",), ("doctor", "--nonsense"), ("quantize", "x")])
def test_wrong_usage_is_2(tonfa, arguments: tuple[str, ...]) -> None:
    result = tonfa(*arguments)
    assert result.exit_code == 2
    assert result.stdout == "" and "Usage:" in result.stderr


def test_debug_shows_the_traceback(tonfa) -> None:
    quiet = tonfa("doctor", "--device", "cuda:99")
    assert quiet.exit_code == 1 and quiet.stderr.startswith("error: ") and "Traceback" not in quiet.stderr
    assert quiet.stderr.count("\n") == 1
    command = [sys.executable, "-m", "tonfa", "doctor", "--device", "cuda:99"]
    loud = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert loud.returncode == 1 and "Traceback" in loud.stderr and "UnsupportedError" in loud.stderr


def test_unexpected_errors_are_not_hidden(tonfa, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("tonfa.cli.doctor.examine", broken)
    assert isinstance(tonfa("doctor").exception, RuntimeError)


def test_a_full_disk_is_one_line(tonfa, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device", "out.png")

    monkeypatch.setattr("tonfa.cli.doctor.examine", full)
    result = tonfa("doctor")
    assert result.exit_code == 1
    assert result.stderr == "error: OSError: [Errno 28] No space left on device: 'out.png'\n"


def test_a_broken_connection_and_a_full_gpu_are_one_line(tonfa, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    for kind in (torch.OutOfMemoryError, HfHubHTTPError.__bases__[0]):

        def fail(*arguments: object, kind: type[Exception] = kind) -> None:
            raise kind("first line\nsecond line")

        monkeypatch.setattr("tonfa.cli.doctor.examine", fail)
        result = tonfa("doctor")
        assert result.exit_code == 1
        assert result.stderr == f"error: {kind.__name__}: first line second line\n"


def test_interrupted_is_130(tonfa, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tonfa.cli.doctor.examine", stop)
    result = tonfa("doctor")
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted; nothing was changed"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_device("cpu").type == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert parse_device("auto").type == "cpu"
    with pytest.raises(UnsupportedError, match="sees no CUDA GPU"):
        parse_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert str(parse_device("auto")) == "cuda"
    assert str(parse_device("cuda:1")) == "cuda:1"
    with pytest.raises(UnsupportedError, match=r"2 GPU\(s\)"):
        parse_device("cuda:2")


@pytest.mark.parametrize("text", ["tpu", "cpu:0", "cuda:", "cuda:-1", "cuda:x", ""])
def test_bad_devices(tonfa, text: str) -> None:
    result = tonfa("doctor", "--device", text)
    assert result.exit_code == 2 and "none of auto, cpu, cuda" in result.stderr


def test_numbers_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 36_012_345, 24 * 10**9, 2 * 10**12)] == [
        "0 B", "999 B", "1.0 kB", "36.0 MB", "24.0 GB", "2000.0 GB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.417, 12.34, 59.99, 185)] == ["0.42 s", "12.3 s", "60.0 s", "3 min 05 s"]


def test_options_have_the_names_of_the_library() -> None:
    """Commands write them out, because importing the library takes seconds."""
    from tonfa.cli import convert, options, quantize
    from tonfa.models.flux import export
    from tonfa.ops.activation import ACTIVATIONS
    from tonfa.ops.table import ATTENTIONS, AUTO
    from tonfa.quantizer.recipe import RECIPES

    attention, _ = get_args(get_args(options.AttentionOption)[0])
    assert get_args(options.Activations) == ACTIVATIONS
    assert get_args(attention) == (*ATTENTIONS, AUTO)
    assert get_args(convert.Form) == get_args(export.Form)
    assert set(get_args(quantize.RecipeName)) == set(RECIPES)
