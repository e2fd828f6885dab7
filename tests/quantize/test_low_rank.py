"""The low-rank branch: optimal where it is exact, near enough where it is randomized, the same every time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import DEVICES, relative_error
from tonfa.quantizer import lowrank
from tonfa.quantizer.lowrank import low_rank


def decaying(n: int, k: int, seed: int = 0) -> Tensor:
    """Singular values fall as 1/i, as slowly as those of a transformer's weights."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, min(n, k), generator=generator)).Q
    right = torch.linalg.qr(torch.randn(k, min(n, k), generator=generator)).Q
    return left / torch.arange(1, min(n, k) + 1) @ right.T


def best_error(matrix: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix.double())
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize(("n", "k"), [(96, 64), (64, 192), (128, 128)])
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_exact_for_small_matrices(n: int, k: int, rank: int) -> None:
    matrix = decaying(n, k)
    factors = low_rank(matrix, rank)
    assert (factors.down.shape, factors.up.shape, factors.subspace) == ((k, rank), (n, rank), None)
    assert relative_error(factors.up @ factors.down.T, matrix) == pytest.approx(best_error(matrix, rank), abs=1e-6)


def test_full_rank_reproduces_the_matrix() -> None:
    matrix = decaying(48, 80)
    factors = low_rank(matrix, 48)
    assert relative_error(factors.up @ factors.down.T, matrix) < 1e-6


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_of_exact_decompositions_do_not_overflow(scale: float) -> None:
    matrix = decaying(96, 64)
    factors = low_rank(scale * matrix, 16)
    found = factors.up.double() @ factors.down.double().T
    assert relative_error(found / scale, matrix.double()) == pytest.approx(best_error(matrix, 16), abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "k"), [(700, 560), (560, 900)])
def test_randomized_is_within_a_thousandth_of_the_best(n: int, k: int, device: str) -> None:
    matrix = decaying(n, k)
    factors = low_rank(matrix.to(device), 32)
    assert factors.subspace is not None
    found = relative_error((factors.up @ factors.down.T).cpu(), matrix)
    assert best_error(matrix, 32) <= found * (1 + 1e-6)
    assert found < best_error(matrix, 32) * 1.001


def test_warm_start_follows_a_changed_matrix() -> None:
    matrix = decaying(600, 560)
    changed = matrix + 0.1 * matrix.square().mean().sqrt() * torch.randn(600, 560)
    factors = low_rank(changed, 32, start=low_rank(matrix, 32).subspace)
    assert relative_error(factors.up @ factors.down.T, changed) < best_error(changed, 32) * 1.002


def test_randomized_is_deterministic_and_the_seed_matters() -> None:
    matrix = torch.randn(560, 540)
    first, again, other = (low_rank(matrix, 16, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.up, again.up)
    assert torch.equal(first.down, again.down)
    assert not torch.equal(first.up, other.up)


def test_singular_values_are_split_evenly() -> None:
    factors = low_rank(100 * decaying(80, 96), 16)
    assert torch.allclose(factors.down.norm(dim=0), factors.up.norm(dim=0), rtol=1e-4)
    gram = factors.up.T @ factors.up
    assert torch.allclose(gram, torch.diag(gram.diag()), atol=1e-3)


def test_zero_matrix_has_zero_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "EXACT_SIDE", 0)
    factors = low_rank(torch.zeros(128, 128), 16)
    assert not factors.up.any()
    assert not factors.down.any()
