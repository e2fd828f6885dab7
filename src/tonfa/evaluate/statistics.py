"""Figures over samples: mean, low percentile, and a bootstrap interval of the mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tonfa.errors import FormatError

Array = npt.NDArray[np.float64]

DRAWS = 2000
"""Resamples of a bootstrap."""
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure over samples, or over those of them whose value is finite."""

    mean: float | None
    """None where no value is finite."""
    low: float | None
    """Of the 95 % interval; None for fewer than two finite values."""
    high: float | None
    median: float | None
    percentile_5: float | None
    count: int
    """Finite values."""
    infinite: int
    """Values left out: a PSNR of equal pictures is infinite."""
    values: tuple[float | None, ...]
    """One for each sample, None where it is infinite: what two candidates are compared by, picture by picture."""


def interval(
    samples: Array,  # (S, ...): one row for each sample
    statistic: Callable[[Array], float],
    seed: int,
) -> tuple[float, float] | None:
    """The percentile bootstrap interval of a statistic of the rows (Efron 1979); None for fewer than two rows.

    Equal seeds give equal intervals, and statistics of equally many rows meet the same resamples.
    """
    if len(samples) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = [statistic(samples[rng.integers(0, len(samples), len(samples))]) for _ in range(DRAWS)]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def estimate(values: npt.ArrayLike, seed: int = 0) -> Estimate:
    """Mean, interval and 5th percentile of (S,) values. Raises FormatError for NaN."""
    array = np.asarray(values, dtype=np.float64)
    if np.isnan(array).any():
        raise FormatError("a value over which a mean is taken is NaN")
    finite = array[np.isfinite(array)]
    every = tuple(float(value) if np.isfinite(value) else None for value in array)
    if not len(finite):
        return Estimate(None, None, None, None, None, 0, len(array), every)
    found = interval(finite, lambda rows: float(rows.mean()), seed)
    low, high = found or (None, None)
    fifth, median = np.quantile(finite, [0.05, 0.5])
    return Estimate(
        mean=float(finite.mean()),
        low=low,
        high=high,
        median=float(median),
        percentile_5=float(fifth),
        count=len(finite),
        infinite=len(array) - len(finite),
        values=every,
    )


def ratio_interval(values: npt.ArrayLike, baseline: npt.ArrayLike, seed: int) -> tuple[float, float] | None:
    """Of the geometric mean of value / baseline, positive numbers of the same samples; None for fewer than two."""
    ratios = np.asarray(values, dtype=np.float64) / np.asarray(baseline, dtype=np.float64)
    return interval(ratios, geometric_mean, seed)


def geometric_mean(values: npt.ArrayLike) -> float:
    """exp(mean(log)); 0 if a value is 0."""
    array = np.asarray(values, dtype=np.float64)
    return 0.0 if (array == 0).any() else math.exp(float(np.log(array).mean()))
