"""The quantizer's loops over columns in one launch, against the same loops in PyTorch and in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support import relative_error
from tonfa.kernels.triton.descent_columns import descent_columns
from tonfa.kernels.triton.gptq_columns import gptq_columns
from tonfa.quantizer import columns as loops


def problem(n: int, columns: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of weights, their steps, of either sign and some zero, and a covariance."""
    mixed = torch.randn(4 * columns, columns, generator=generator)
    mixed = mixed @ torch.randn(columns, columns, generator=generator)
    hessian = mixed.T @ mixed / len(mixed) + 0.1 * columns * torch.eye(columns)
    weights = torch.randn(columns, n, generator=generator)
    steps = 0.3 * torch.randn(1, n, generator=generator).expand(columns, n).contiguous()
    steps[:, ::7] = 0
    return weights.to(device), steps.to(device), hessian.to(device)


def reciprocal(steps: Tensor) -> Tensor:
    return torch.where(steps == 0, 0.0, steps.reciprocal())


@pytest.mark.parametrize(("n", "columns"), [(50, 128), (8, 64), (3, 16)])
@pytest.mark.parametrize("lowest", [-8, -7])
def test_gptq_columns(n: int, columns: int, lowest: int, device: torch.device, generator: torch.Generator) -> None:
    weights, steps, hessian = problem(n, columns, generator, device)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    feedback = inverse / inverse.diagonal().unsqueeze(1)
    feedback += torch.full_like(feedback, 7.0).tril(-1)  # what is below is not used
    codes, errors = gptq_columns(weights, feedback, steps, reciprocal(steps), lowest)
    rest, steps64 = weights.double(), steps.double()
    expected, left = torch.empty_like(rest), torch.empty_like(rest)
    for j in range(columns):
        expected[j] = (rest[j] * reciprocal(steps64[j])).round().clamp(lowest, 7)
        left[j] = rest[j] - expected[j] * steps64[j]
        rest[j + 1 :] -= feedback[j, j + 1 :].double().unsqueeze(1) * left[j]
    same = (codes == expected).all(dim=0)  # a tie that falls to the other side changes all that follows in its row
    assert same.double().mean() > 0.9
    assert codes.amin() >= lowest and codes.amax() <= 7
    assert torch.equal(codes[:, steps[0] == 0], torch.zeros_like(codes[:, steps[0] == 0]))
    assert relative_error(errors[:, same], left[:, same]) < 1e-4


@pytest.mark.parametrize(("n", "columns"), [(50, 64), (3, 16)])
@pytest.mark.parametrize("lowest", [-8, -7])
def test_descent_columns(n: int, columns: int, lowest: int, device: torch.device, generator: torch.Generator) -> None:
    weights, steps, hessian = problem(n, columns, generator, device)
    step = steps[0].contiguous()
    codes = (weights * reciprocal(step)).round().clamp(lowest, 7)
    gradient = hessian @ (codes * step - weights)
    ratios = reciprocal(step) / hessian.diagonal().unsqueeze(1)
    expected, slope = codes.double(), gradient.double()
    for j in range(columns):
        best = (expected[j] - slope[j] * ratios[j].double()).round().clamp(lowest, 7)
        best = torch.where(step == 0, expected[j], best)
        slope += hessian[j].double().unsqueeze(1) * (best - expected[j]) * step.double()
        expected[j] = best
    codes, gradient = descent_columns(codes, step, ratios, gradient, hessian, lowest)
    same = (codes == expected).all(dim=0)
    assert same.double().mean() > 0.9
    assert relative_error(gradient[:, same], slope[:, same]) < 1e-4


@pytest.mark.gpu
def test_the_loops_take_the_kernels_where_there_is_a_gpu(generator: torch.Generator) -> None:
    device = torch.device("cuda")
    weights, steps, hessian = problem(4096, 128, generator, device)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    feedback = inverse / inverse.diagonal().unsqueeze(1)
    assert loops._has_kernels(device)
    found = loops.code_columns(weights.clone(), feedback, steps, reciprocal(steps), -8)[0]
    expected = loops.code_columns(*(t.cpu() for t in (weights, feedback, steps, reciprocal(steps))), -8)[0]
    assert (found.cpu() == expected).all(dim=0).double().mean() > 0.9
