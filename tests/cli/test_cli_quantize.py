"""`tonfa quantize`: from a pipeline's folder to a checkpoint that loads; refusals, interruption, resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tonfa.errors import CheckpointError
from tonfa.models.flux.plan import FluxDims, flux_dims

WEIGHTS = "diffusion_pytorch_model.safetensors"


def test_checkpoint_loads_and_is_near(depth_pipeline: Path, checkpoint: Path) -> None:
    from diffusers import FluxTransformer2DModel

    from tonfa import SVDQFluxTransformer2DModel

    model = SVDQFluxTransformer2DModel.from_pretrained(checkpoint)
    assert model.config.quantization_config["rank"] == 32
    dense = FluxTransformer2DModel.from_pretrained(depth_pipeline / "transformer")
    linear = dense.transformer_blocks[0].ff.net[0].proj
    weights = model.transformer_blocks[0].ff.up.weights()
    error = (weights.dense()[0].float() - linear.weight.float()).norm() / linear.weight.float().norm()
    assert error < 0.1


def test_messages(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    result = tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", "--iterations", 0)
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'q'}\n"
    assert "rank 32, 0 iterations, bfloat16, on cpu" in result.stderr
    assert "x smaller" in result.stderr and "largest relative errors" in result.stderr
    assert not (tmp_path / "q.partial").exists()


def test_json_and_options(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    arguments = ("--rank", 16, "--iterations", 0, "--dtype", "float32", "--json")
    result = tonfa("quantize", depth_pipeline / "transformer", "-o", tmp_path / "q", *arguments)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    files = sum(f.stat().st_size for f in (tmp_path / "q").glob("*.safetensors"))
    assert 0 < report["bytes_out"] <= files and report["resumed"] == 0
    assert report["errors"]["transformer_blocks.0.ff.up"] < 0.2
    tensors = load_file(tmp_path / "q" / WEIGHTS)
    assert tensors["transformer_blocks.0.ff.up.proj_up"].shape == (512, 16)
    assert tensors["transformer_blocks.0.ff.up.proj_up"].dtype == torch.float32


def test_existing_folder(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    command = ("quantize", depth_pipeline, "--out", tmp_path / "q", "--iterations", 0)
    assert tonfa(*command).exit_code == 0
    before = (tmp_path / "q" / WEIGHTS).read_bytes()
    refused = tonfa(*command)
    assert refused.exit_code == 1 and "add --overwrite" in refused.stderr
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == before
    assert tonfa(*command, "--overwrite").exit_code == 0
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("no-such-folder", "no folder here, nor a Hub id"),
        ("a/b/c", "no folder here, nor a Hub id"),
        ("org/no-such-model", "the Hub cannot be reached"),
        ("file", "no folder here, nor a Hub id"),
        ("empty", "no FLUX model: .* has no config.json"),
        ("vae", "no FLUX model: .* is of class AutoencoderKL, expected FluxTransformer2DModel"),
        ("int4", "quantized already"),
        ("no-weights", "no diffusion_pytorch_model.safetensors"),
        ("broken-config", "is no JSON"),
        ("no-heads", "num_attention_heads is 'many', expected an integer"),
        ("unknown-key", "describes no FLUX transformer: .*surprise"),
        ("wrong-config", "tensors do not fit the model"),
    ],
)
def test_what_cannot_be_quantized(
    tonfa,
    depth_pipeline: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    message: str,
) -> None:
    import re
    import shutil

    monkeypatch.chdir(tmp_path)
    config = json.loads((depth_pipeline / "transformer" / "config.json").read_text())
    Path("file").write_text("x")
    Path("empty").mkdir()
    Path("vae").symlink_to(depth_pipeline / "vae")
    Path("int4").symlink_to(checkpoint)
    changes = {
        "no-weights": {},
        "no-heads": {"num_attention_heads": "many"},
        "unknown-key": {"surprise": 1},
        "wrong-config": {"num_layers": 2},
    }
    for name, change in changes.items():
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config | change))
        if name != "no-weights":
            shutil.copy(depth_pipeline / "transformer" / WEIGHTS, name)
    Path("broken-config").mkdir()
    Path("broken-config/config.json").write_text("{")
    result = tonfa("quantize", model, "--out", "q")
    assert result.exit_code == 1, result.output
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert not Path("q").exists()


def test_wrong_values_are_named(tonfa, depth_pipeline: Path, tmp_path: Path) -> None:
    assert tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", "--rank", 0).exit_code == 2
    assert tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", "--dtype", "int3").exit_code == 2
    odd = tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", "--rank", 24)
    assert odd.exit_code == 1 and "multiple of 16" in odd.stderr
    wide = tonfa("quantize", depth_pipeline, "--out", tmp_path / "q", "--rank", 256)
    assert wide.exit_code == 1 and "rank 256 exceeds the smaller side" in wide.stderr


def test_interrupted_then_repeated(
    tonfa, depth_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tonfa.quantizer import build

    whole = tonfa("quantize", depth_pipeline, "--out", tmp_path / "whole", "--iterations", 1)
    assert whole.exit_code == 0
    original, calls = build.quantize_planned, []

    def stopped(linear, *arguments):
        calls.append(linear.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(linear, *arguments)

    command = ("quantize", depth_pipeline, "--out", tmp_path / "q", "--iterations", 1)
    with monkeypatch.context() as patch:
        patch.setattr(build, "quantize_planned", stopped)
        result = tonfa(*command)
    assert result.exit_code == 130
    assert result.stderr.endswith("interrupted; nothing half-written; run the same command again to go on\n")
    assert not (tmp_path / "q").exists() and (tmp_path / "q.partial").is_dir()

    again = tonfa(*command)
    assert again.exit_code == 0 and f"resuming   {tmp_path / 'q.partial'}" in again.stderr
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert not (tmp_path / "q.partial").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_control_c_in_a_real_run(depth_pipeline: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(depth_pipeline), "--out", str(tmp_path / "q"), "--iterations", "1000000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tonfa", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where the tests run in background
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "q.partial").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stdout == "" and "interrupted; nothing half-written" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "q").exists()


def test_dimensions_have_the_defaults_of_diffusers() -> None:
    import inspect

    from diffusers import FluxTransformer2DModel

    defaults = {k: p.default for k, p in inspect.signature(FluxTransformer2DModel.__init__).parameters.items()}
    hidden = defaults["num_attention_heads"] * defaults["attention_head_dim"]
    expected = FluxDims(hidden, defaults["num_layers"], defaults["num_single_layers"], defaults["guidance_embeds"])
    assert flux_dims({}) == expected
    assert flux_dims({"guidance_embeds": True, "num_layers": 0}).num_layers == 0
    for bad in (-1, 2.0, None, True):
        with pytest.raises(CheckpointError, match="num_layers"):
            flux_dims({"num_layers": bad})
