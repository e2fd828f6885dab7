"""Moments: equal to float64 sums however the batches fall, merged, saved and loaded; NaN and Inf named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from support import DEVICES, outlier_input, relative_error
from tonfa.checkpoint.shards import write_tensors
from tonfa.errors import CheckpointError, FormatError
from tonfa.quantizer import moments as module
from tonfa.quantizer.moments import InputMoments


def gathered(x: Tensor, sizes: tuple[int, ...], kept: int = 50, seed: int = 0) -> InputMoments:
    moments = InputMoments.empty("block.3", x.shape[1], kept=kept, seed=seed, device=x.device)
    for batch in x.split(list(sizes)):
        moments.add(batch)
    return moments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sizes", [(300,), (1, 99, 200)])
def test_sums_are_those_of_float64(device: str, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 64)
    x = outlier_input(300, 128, torch.Generator().manual_seed(0))
    found, exact = gathered(x.to(device), sizes), x.double()
    assert found.tokens == 300
    assert torch.equal(found.absmax.cpu(), x.float().abs().amax(dim=0))
    assert torch.allclose(found.mean().cpu().double(), exact.mean(dim=0), atol=1e-5)
    assert torch.allclose(found.rms().cpu().double(), exact.square().mean(dim=0).sqrt(), rtol=1e-5)
    # Tensor cores cut a few bits of the float32 sums.
    bound = 1e-6 if device == "cpu" else 1e-5
    assert relative_error(found.covariance(shrunk=False).cpu(), exact.T @ exact / 300) < bound
    centered = exact - exact.mean(dim=0)
    assert relative_error(found.covariance(centered=True, shrunk=False).cpu(), centered.T @ centered / 300) < 1e-5


def test_shrinkage_keeps_powers_and_weakens_products() -> None:
    moments = gathered(torch.randn(256, 64), (256,))
    plain, shrunk = moments.covariance(shrunk=False), moments.covariance()
    assert torch.equal(plain.diagonal(), shrunk.diagonal())
    off = ~torch.eye(64, dtype=torch.bool)
    assert torch.allclose(shrunk[off], plain[off] * 256 / (256 + 64))


def test_leading_dimensions_are_tokens() -> None:
    x = torch.randn(2, 3, 5, 64)
    found = gathered(x.reshape(-1, 64), (30,))
    moments = InputMoments.empty("block.3", 64, kept=50)
    moments.add(x)
    assert torch.equal(moments.second, found.second)
    assert torch.equal(moments.sample, found.sample)


def test_sample_is_bounded_of_real_tokens_and_even() -> None:
    x = torch.arange(2000, dtype=torch.float32).unsqueeze(1).expand(-1, 64)
    moments = InputMoments.empty("x", 64, kept=400, dtype=torch.float32)
    for batch in x.split(100):
        moments.add(batch)
    chosen = moments.sample[:, 0]
    assert chosen.unique().numel() == 400
    assert (chosen[:100] < 1000).float().mean() == pytest.approx(0.5, abs=0.15)
    assert (chosen < 1000).float().mean() == pytest.approx(0.5, abs=0.08)


def test_merged_parts_are_the_whole() -> None:
    x = outlier_input(400, 64, torch.Generator().manual_seed(0))
    whole = gathered(x, (400,))
    first, second = gathered(x[:150], (150,), seed=1), gathered(x[150:], (250,), seed=2)
    first.merge(second)
    assert first.tokens == 400
    assert torch.equal(first.absmax, whole.absmax)
    assert relative_error(first.second, whole.second) < 1e-6
    assert torch.allclose(first.total, whole.total)
    rows = {tuple(row) for row in x.float().tolist()}
    assert len(first.sample) == 50
    assert {tuple(row) for row in first.sample.float().tolist()} <= rows


def test_only_equal_inputs_merge() -> None:
    with pytest.raises(FormatError, match=r"block\.3 with 64 channels cannot be merged with other with 64"):
        gathered(torch.ones(2, 64), (2,)).merge(InputMoments.empty("other", 64))


def test_saved_and_loaded(tmp_path: Path) -> None:
    moments = gathered(torch.randn(80, 64), (80,), seed=7)
    moments.save(tmp_path / "m.safetensors")
    found = InputMoments.load(tmp_path / "m.safetensors")
    assert (found.name, found.tokens, found.kept, found.seed) == ("block.3", 80, 50, 7)
    for name in ("absmax", "total", "second", "sample", "keys"):
        assert torch.equal(getattr(found, name), getattr(moments, name)), name
    more = torch.randn(20, 64)
    moments.add(more)
    found.add(more)
    assert torch.equal(found.sample, moments.sample)


def test_another_file_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m.safetensors", {"x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="holds no moments of a calibration"):
        InputMoments.load(tmp_path / "m.safetensors")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_inputs_are_named(bad: float, tmp_path: Path) -> None:
    x = torch.randn(10, 64)
    x[3, 17] = bad
    moments = gathered(x, (10,))
    with pytest.raises(FormatError, match=r"block\.3: 1 channels .* NaN or Inf, the first is channel 17"):
        moments.check()
    with pytest.raises(FormatError, match="NaN or Inf"):
        moments.save(tmp_path / "m.safetensors")


def test_overflow_of_squares_is_named() -> None:
    with pytest.raises(FormatError, match=r"block\.3: 64 channels"):
        gathered(torch.full((4, 64), 1e30), (4,)).check()


def test_missing_and_misshapen_inputs_are_named() -> None:
    with pytest.raises(FormatError, match=r"block\.3: no calibration input has reached it"):
        gathered(torch.zeros(0, 64), (0,)).check()
    with pytest.raises(FormatError, match=r"block\.3: has 128 input channels, its moments are of 64"):
        gathered(torch.zeros(2, 64), (2,)).check(128)
    with pytest.raises(FormatError, match=r"block\.3: expected float inputs of 64 channels, got .*\(2, 65\)"):
        gathered(torch.zeros(2, 64), (2,)).add(torch.zeros(2, 65))
    with pytest.raises(FormatError, match=r"int64"):
        gathered(torch.zeros(2, 64), (2,)).add(torch.zeros(2, 64, dtype=torch.int64))
