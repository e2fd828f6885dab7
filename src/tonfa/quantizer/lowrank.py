"""The low-rank branch: the leading singular triplets of a matrix, exact where that is cheap, else randomized.

Exact means eigenvectors of the smaller Gram matrix, about three times as fast as LAPACK's SVD. That squares the
condition number, which costs digits of small singular values; a branch wants the large ones, and projecting the matrix
itself on the vectors leaves no error that they had not.

Subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061) costs a few products with a thin matrix where LAPACK
would take minutes for a FLUX weight of 12288 x 3072. The quantizer decomposes the same weight again and again, a
little changed each time, so each decomposition starts from the subspace of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXACT_SIDE = 512
"""Matrices whose smaller side is at most this long are decomposed by LAPACK (20 ms on one CPU core; 3 ms at 256)."""
OVERSAMPLING = 16
COLD_ITERATIONS = 4
WARM_ITERATIONS = 1


@dataclass(frozen=True)
class Factors:
    """A matrix (N, K) of rank R as up @ down^T, its singular values split evenly between the two."""

    down: Tensor  # (K, R) float32
    up: Tensor  # (N, R) float32
    subspace: Tensor | None  # (K, R + OVERSAMPLING) float32, where the next decomposition may start

    def rounded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`down` and `up` as a checkpoint of this dtype holds them."""
        return self.down.to(dtype), self.up.to(dtype)


def _orthonormal(x: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(x).Q
    return basis


def _subspace(matrix: Tensor, width: int, start: Tensor | None, seed: int) -> Tensor:
    """(N, K) -> (K, width) with orthonormal columns that span about the leading right singular vectors."""
    iterations = WARM_ITERATIONS
    if start is None:
        iterations = COLD_ITERATIONS
        noise = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed))
        start = noise.to(matrix.device)
    for _ in range(iterations):
        start = _orthonormal(matrix.T @ _orthonormal(matrix @ start))
    return start


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, K) -> leading left vectors (N, R), values (R,) and right vectors (R, K)."""
    if matrix.shape[0] < matrix.shape[1]:
        left, values, right = _leading(matrix.T, rank)
        return right.T, values, left.T
    scale = matrix.abs().amax().clamp_min(torch.finfo(matrix.dtype).tiny)  # or squares of large numbers overflow
    scaled = matrix / scale
    vectors = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:].flip(1)
    left = scaled @ vectors
    values = torch.linalg.vector_norm(left, dim=0)
    return left / torch.where(values > 0, values, 1.0), values * scale, vectors.T


def low_rank(matrix: Tensor, rank: int, *, start: Tensor | None = None, seed: int = 0) -> Factors:
    """The best approximation of rank R to a float32 matrix (N, K), R <= min(N, K), in the Frobenius norm.

    Deterministic for one device. `start` is the `subspace` of an earlier decomposition of a similar matrix.
    """
    width = rank + OVERSAMPLING
    subspace = None
    if min(matrix.shape) <= max(EXACT_SIDE, width):
        left, values, right = _leading(matrix, rank)
    else:
        subspace = _subspace(matrix, width, start, seed)
        basis, small = torch.linalg.qr(matrix @ subspace)
        # A GPU takes milliseconds for so small a matrix, LAPACK half of one.
        left, values, right = (t.to(small.device) for t in torch.linalg.svd(small.cpu()))
        left, right = basis @ left, right @ subspace.T
    root = values[:rank].sqrt()
    return Factors((right[:rank] * root.unsqueeze(1)).T.contiguous(), left[:, :rank] * root, subspace)
