"""PSNR and SSIM of pictures, one value for each pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tonfa.errors import FormatError

WINDOW, SIGMA = 11, 1.5
"""Pixels a side of SSIM's Gaussian window, and its standard deviation."""
C1, C2 = 0.01**2, 0.03**2
"""SSIM's constants for values from 0 to 1."""


def to_unit(pictures: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> float64 from 0 to 1."""
    return pictures.double() / 255


def _check(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise FormatError(f"pictures of one shape (B, C, H, W) are compared, got {tuple(a.shape)} and {tuple(b.shape)}")


def psnr(
    a: Tensor,  # (B, C, H, W) float from 0 to 1
    b: Tensor,  # (B, C, H, W) float from 0 to 1
) -> Tensor:  # (B,) float64
    """Peak signal-to-noise ratio in dB, -10 log10 of the mean squared error; infinite for equal pictures."""
    _check(a, b)
    return -10 * (a.double() - b.double()).square().mean(dim=(1, 2, 3)).log10()


def ssim(
    a: Tensor,  # (B, C, H, W) float from 0 to 1
    b: Tensor,  # (B, C, H, W) float from 0 to 1
) -> Tensor:  # (B,) float64
    """Mean structural similarity: Wang, Bovik, Sheikh, Simoncelli, IEEE TIP 13(4), 2004, equation 13.

    Weighted means, variances and covariance in a Gaussian window of 11 x 11 pixels, where it lies within the picture;
    the mean over all places and channels. Raises FormatError for pictures smaller than the window.
    """
    _check(a, b)
    if min(a.shape[2:]) < WINDOW:
        raise FormatError(f"SSIM needs pictures of {WINDOW} x {WINDOW} pixels, got {a.shape[2]} x {a.shape[3]}")
    offsets = torch.arange(WINDOW, dtype=torch.float64, device=a.device) - WINDOW // 2
    weights = (-offsets.square() / (2 * SIGMA**2)).exp()
    weights = weights / weights.sum()

    def blur(x: Tensor) -> Tensor:
        rows = functional.conv2d(x.flatten(0, 1)[:, None], weights.view(1, 1, -1, 1))
        return functional.conv2d(rows, weights.view(1, 1, 1, -1)).view(*x.shape[:2], rows.shape[2], -1)

    a, b = a.double(), b.double()
    mean_a, mean_b = blur(a), blur(b)
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + C1) / (mean_a**2 + mean_b**2 + C1)
    structure = (2 * covariance + C2) / (variance_a + variance_b + C2)
    return (luminance * structure).mean(dim=(1, 2, 3))
