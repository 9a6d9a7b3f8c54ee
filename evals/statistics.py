"""Intervals for shares and means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from math import sqrt
from statistics import fmean, stdev


def wilson(right: float, n: float, z: float = 1.96) -> tuple[float, float]:
    """95 % Wilson interval of right / n (Wilson 1927)."""
    if n == 0:
        return (0.0, 1.0)
    share, spread = right / n, z * z / n
    center = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return (round(max(0.0, center - half), 4), round(min(1.0, center + half), 4))


def clustered_error(values: Sequence[float], groups: Sequence[Hashable]) -> float:
    """Standard error of the mean of `values` when those of a group vary together (linearised, as for a sample of clusters)."""
    center = fmean(values)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, group in zip(values, groups, strict=True):
        sums[group] += value - center
    n = len(sums)
    return sqrt(n / (n - 1) * sum(each * each for each in sums.values())) / len(values) if n > 1 else 0.0


def interval(values: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of the mean of scores from 0 to 1: Wilson's, with as many trials as have the standard error that the groups
    give (Korn and Graubard 1998, with Wilson's in place of Clopper and Pearson's)."""
    if not values:
        return (0.0, 1.0)
    center, error = min(1.0, max(0.0, fmean(values))), clustered_error(values, groups)
    trials = center * (1 - center) / error**2 if error and 0 < center < 1 else float(len(set(groups)))
    return wilson(center * trials, trials)


def difference_interval(gains: Sequence[float], groups: Sequence[Hashable]) -> tuple[float, float]:
    """95 % interval of the mean of paired differences; where all are the same, by the rule of three."""
    error = clustered_error(gains, groups)
    half = 1.96 * error if error else 3 / len(set(groups))
    return (round(max(-1.0, fmean(gains) - half), 4), round(min(1.0, fmean(gains) + half), 4))


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean of `values` (Student's t)."""
    from scipy.stats import t  # for the reports alone, which are made where the tests are

    return float(t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
