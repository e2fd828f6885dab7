"""Hessian, GPTQ, coordinate descent and whitened refit against independent formulas in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support import DEVICES, relative_error
from tonfa.errors import FormatError
from tonfa.quantizer.gptq import gptq
from tonfa.quantizer.hessian import Hessian, factor_hessian
from tonfa.quantizer.lowrank import low_rank
from tonfa.quantizer.refine import refine
from tonfa.quantizer.residual import nearest, search_scales
from tonfa.quantizer.whitened import whitened_low_rank


def second_moments(k: int, seed: int = 0) -> Tensor:
    """Of correlated channels of very different size, float64."""
    g = torch.Generator().manual_seed(seed)
    mixed = torch.randn(4 * k, k, generator=g) @ (torch.randn(k, k, generator=g) / torch.arange(1, k + 1).sqrt())
    x = (mixed * torch.randn(k, generator=g).exp()).double()
    return x.T @ x / len(x)


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    return (codes.float().unflatten(1, (-1, 64)) * scales.unsqueeze(2)).flatten(1)


def cost(target: Tensor, found: Tensor, hessian: Hessian) -> float:
    error = (target - found).double()
    return float((error @ hessian.matrix.double() * error).sum())


def problem(n: int = 48, k: int = 192, seed: int = 0) -> tuple[Tensor, Tensor, Hessian]:
    target = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    return target, search_scales(target, torch.bfloat16), factor_hessian(second_moments(k, seed))


def test_factors_are_those_of_the_damped_moments() -> None:
    second = second_moments(96)
    found = factor_hessian(second)
    damped = second + 0.01 * second.diagonal().mean() * torch.eye(96)
    assert relative_error(found.matrix, damped) < 1e-6
    ordered = damped[found.order][:, found.order]
    assert (ordered.diagonal().diff() <= 0).all()
    assert torch.equal(found.factor, found.factor.triu())
    assert relative_error(found.factor.double() @ found.factor.double().T, ordered) < 1e-6
    inverse = torch.linalg.cholesky(torch.linalg.inv(ordered), upper=True)
    assert relative_error(found.inverse, inverse) < 1e-4
    error = torch.randn(8, 96)
    assert found.error(error) == pytest.approx(cost(error, torch.zeros_like(error), found), rel=1e-5)
    assert float(found.whiten(error).square().sum()) == pytest.approx(found.error(error), rel=1e-5)


def test_channels_that_are_never_used_do_not_hurt() -> None:
    second = second_moments(64)
    second[5], second[:, 5] = 0, 0
    assert torch.isfinite(factor_hessian(second).inverse).all()
    assert torch.isfinite(factor_hessian(torch.zeros(64, 64)).inverse).all()


def test_moments_that_are_no_covariance_are_named() -> None:
    with pytest.raises(FormatError, match=r"block\.2: .* not finite"):
        factor_hessian(torch.full((64, 64), torch.nan), "block.2")
    with pytest.raises(FormatError, match=r"block\.2: .* no covariance"):
        factor_hessian(torch.eye(64) - 9 * torch.ones(64, 64).fill_diagonal_(0), "block.2")


@pytest.mark.parametrize("device", DEVICES)
def test_gptq_follows_the_textbook(device: str) -> None:
    """One column at a time with the inverse updated by elimination, in float64 (the OBQ form of the same steps)."""
    target, scales, hessian = problem(16, 192)
    rest, inverse = target.double(), torch.linalg.inv(hessian.matrix.double())
    steps = scales.double().repeat_interleave(64, dim=1)
    expected = torch.zeros_like(rest)
    for j in hessian.order.tolist():
        expected[:, j] = (rest[:, j] / steps[:, j]).round().clamp(-8, 7)
        error = (rest[:, j] - expected[:, j] * steps[:, j]) / inverse[j, j]
        rest = rest - torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    moved = Hessian(*(getattr(hessian, f).to(device) for f in ("matrix", "order", "factor")))
    found = gptq(target.to(device), scales.to(device), moved).cpu()
    assert (found != expected).float().mean() < 0.002
    assert cost(target, decoded(found, scales), hessian) == pytest.approx(
        cost(target, decoded(expected, scales), hessian), rel=1e-2
    )


@settings(max_examples=15)
@given(st.integers(0, 2**31))
def test_gptq_beats_rounding_and_descent_beats_gptq(seed: int) -> None:
    target, scales, hessian = problem(seed=seed)
    rounded = cost(target, decoded(nearest(target, scales), scales), hessian)
    codes = gptq(target, scales, hessian)
    assert set(codes.unique().tolist()) <= set(range(-8, 8))
    once = cost(target, decoded(codes, scales), hessian)
    assert once < 0.9 * rounded
    before = once
    for _ in range(3):
        codes, scales = refine(target, codes, scales, hessian, torch.bfloat16, sweeps=1)
        now = cost(target, decoded(codes, scales), hessian)
        assert now <= before * (1 + 1e-5)
        before = now
    assert before < 0.99 * once
    assert torch.equal(scales, scales.bfloat16().float())
    assert torch.equal(codes, codes.round().clamp(-8, 7))


def test_with_independent_channels_rounding_is_the_optimum() -> None:
    target, scales, _ = problem()
    hessian = factor_hessian(torch.diag(torch.rand(192).double() + 0.1))
    codes = gptq(target, scales, hessian)
    assert torch.equal(codes, nearest(target, scales).float())
    assert torch.equal(refine(target, codes, scales, hessian, torch.bfloat16, sweeps=1)[0][:, :64], codes[:, :64])


def test_lowest_code_is_respected() -> None:
    target, scales, hessian = problem()
    codes = gptq(target, scales / 2, hessian, lowest=-7)
    assert codes.min() == -7
    assert refine(target, codes, scales / 2, hessian, torch.bfloat16, sweeps=1, lowest=-7)[0].min() == -7


def test_scales_of_descent_are_least_squares() -> None:
    """One group: the scale that a single sweep ends with is the regression of the target on the codes it ends with."""
    target, scales, hessian = problem(32, 64)
    codes, found = refine(target, gptq(target, scales, hessian), scales, hessian, torch.float32, sweeps=1)
    h, c = hessian.matrix.double(), codes.double()
    exact = ((c @ h) * target.double()).sum(1) / ((c @ h) * c).sum(1)
    assert torch.allclose(found[:, 0].double(), exact, rtol=1e-4)


def test_zero_scales_stay_zero() -> None:
    target, _, hessian = problem(8, 128)
    scales = torch.zeros(8, 2)
    codes = gptq(target, scales, hessian)
    assert not codes.any()
    again, kept = refine(target, codes, scales, hessian, torch.bfloat16, sweeps=1)
    assert not again.any()
    assert not kept.any()


@pytest.mark.parametrize("rank", [4, 16])
def test_whitened_refit_is_the_optimum(rank: int) -> None:
    """Compared with the closed form by the symmetric square root, in float64, and with alternating least squares."""
    hessian = factor_hessian(second_moments(96))
    matrix = torch.randn(64, 96)
    values, vectors = torch.linalg.eigh(hessian.matrix.double())
    root, unroot = (vectors * values.sqrt() @ vectors.T), (vectors / values.sqrt() @ vectors.T)
    u, s, v = torch.linalg.svd(matrix.double() @ root)
    expected = (u[:, :rank] * s[:rank]) @ v[:rank] @ unroot
    factors = whitened_low_rank(matrix, hessian, rank, start=None, seed=0)
    found = factors.up @ factors.down.T
    assert cost(matrix, found, hessian) == pytest.approx(cost(matrix, expected, hessian), rel=1e-4)
    assert relative_error(found, expected) < 1e-2
    plain = low_rank(matrix, rank)
    assert cost(matrix, found, hessian) < 0.9 * cost(matrix, plain.up @ plain.down.T, hessian)
    h, right = hessian.matrix.double(), factors.down.double() + 0.3 * torch.randn(96, rank)
    for _ in range(30):
        left = torch.linalg.lstsq((right.T @ h @ right), right.T @ h @ matrix.double().T).solution.T
        right = torch.linalg.lstsq(left, matrix.double()).solution.T
    assert cost(matrix, found, hessian) <= cost(matrix, left @ right.T, hessian) * (1 + 1e-5)
