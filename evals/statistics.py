"""Intervals for shares and means."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import stdev


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson interval of right / n (Wilson 1927)."""
    if n == 0:
        return (0.0, 1.0)
    share, spread = right / n, z * z / n
    center = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return (round(max(0.0, center - half), 4), round(min(1.0, center + half), 4))


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean of `values` (Student's t)."""
    from scipy.stats import t  # for the reports alone, which are made where the tests are

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
