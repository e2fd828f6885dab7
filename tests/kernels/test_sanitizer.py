"""Memory and synchronization of the CUDA C++ kernels under compute-sanitizer, each tool over `sanitize.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).parent / "sanitize.py"
FOUND = 99
"""Exit code of the sanitizer for what it found."""


def sanitizer() -> str | None:
    """The program, from PATH or a toolkit."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = os.pathsep.join(str(Path(home) / "bin") for home in homes if home)
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=folders)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kernels compiled, and found right, before a tool slows that down."""
    cache = str(tmp_path_factory.mktemp("kernels"))
    made = {**os.environ, "TONFA_CACHE_DIR": cache, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM)], env=made, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return made


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sanitizer() is None, reason="compute-sanitizer is neither in PATH nor in CUDA_HOME")
@pytest.mark.parametrize("backend", ["cuda", "hopper"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_tool(tool: str, backend: str, environment: dict[str, str]) -> None:
    if backend == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    # cuda-bindings asks the driver for functions that it may not have: errors of the API are no finding.
    options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", str(FOUND), "--launch-timeout", "120"]
    command = [str(sanitizer()), *options, sys.executable, str(PROGRAM), backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    if "Device not supported" in text:
        pytest.skip("compute-sanitizer does not support this device or its driver")
    assert done.returncode == 0, text
    assert "ERROR SUMMARY: 0 errors" in text or "RACECHECK SUMMARY: 0 hazards" in text, text
