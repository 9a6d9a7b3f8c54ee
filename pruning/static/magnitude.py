"""Magnitude pruning: the smallest weights of a matrix go. No statistics."""

from __future__ import annotations

from torch import Tensor

from pruning.static.patterns import NM, Pattern, dropped_in_all, dropped_in_groups


def empty(columns: int, device: object = None) -> None:
    return None


def accumulate(statistics: None, rows: Tensor, weights: Tensor) -> None:
    return None


def prepare(statistics: None) -> None:
    return None


def solve(weight: Tensor, statistics: None, kept: int, pattern: Pattern) -> Tensor:
    """The weight [out, in] with `kept` weights left, as they were."""
    scores = weight.float().abs()
    dropped = dropped_in_groups(scores, pattern) if isinstance(pattern, NM) else dropped_in_all(scores, kept)
    return weight.masked_fill(dropped, 0)
