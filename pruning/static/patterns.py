"""Which weights go: masks that remove exactly as many as asked for, wherever the scores allow or n of every m."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import floor

import torch
from torch import Tensor


@dataclass(frozen=True)
class NM:
    """`keep` weights of every `of` neighbours in a row stay: 2:4 is NM(2, 4). The convention of arXiv 2102.04010 and of hardware."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise ValueError(f"{self.keep}:{self.of} keeps nothing or everything; n:m needs 0 < n < m")

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of

    def check_columns(self, columns: int) -> None:
        """Raise ValueError where rows of `columns` weights do not split into whole groups."""
        if columns % self.of:
            raise ValueError(f"{self.keep}:{self.of} needs rows in whole groups of {self.of}; {columns} columns are not")


# What a criterion is asked for: exactly so many weights to remove from a matrix, or a pattern.
Target = int | NM


@dataclass(frozen=True)
class Pruned:
    """One matrix at every target asked for (same shape and dtype, zeros where weights went), and what the solution took.

    `damping` is the share of the mean diagonal that was added to the Hessian, after `retries` factorisations failed with less.
    """

    weights: list[Tensor] = field(repr=False)
    damping: float = 0.0
    retries: int = 0


def check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside [0, 1): it is the share of weights to remove")


def pruned_count(total: int, sparsity: float) -> int:
    """Weights of `total` to remove for `sparsity` in [0, 1), ValueError outside it. Exact for count / total back again."""
    check_sparsity(sparsity)
    return round(total * sparsity)


def most_pruned(total: int, sparsity: float) -> int:
    """The largest count that does not exceed `sparsity`; a millionth of a weight is forgiven, so that 0.6 of 10 is 6."""
    check_sparsity(sparsity)
    return floor(total * sparsity + 1e-6)


def smallest(scores: Tensor, count: int) -> Tensor:
    """True at exactly the `count` smallest of `scores` (any shape); of equal ones the first go first. NaN is a ValueError."""
    _check_scores(scores, count, scores.numel())
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    threshold = flat.kthvalue(count).values
    gone = flat < threshold
    ties = (flat == threshold).nonzero()[:, 0]
    gone[ties[: count - int(gone.sum())]] = True
    return gone.view(scores.shape)


def smallest_per_row(scores: Tensor, count: int) -> Tensor:
    """True at exactly `count` of `scores` [rows, columns]: the smallest of each row, the same number in all rows.

    What does not divide is taken one more from the rows that lose least by it.
    """
    _check_scores(scores, count, scores.numel())
    each, more = divmod(count, len(scores))
    order = scores.argsort(dim=1, stable=True)
    gone = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order[:, :each], True)
    if more:
        next_up = order[:, each : each + 1]
        rows = scores.gather(1, next_up)[:, 0].argsort(stable=True)[:more]
        gone[rows, next_up[rows, 0]] = True
    return gone


def smallest_of_groups(scores: Tensor, pattern: NM) -> Tensor:
    """True at the `of - keep` smallest of every `of` neighbours in each row of `scores` [rows, columns]."""
    pattern.check_columns(scores.shape[-1])
    _check_scores(scores, 0, 0)
    groups = scores.reshape(-1, pattern.of)
    order = groups.argsort(dim=1, stable=True)
    gone = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order[:, : pattern.of - pattern.keep], True)
    return gone.view(scores.shape)


def follows(weight: Tensor, pattern: NM) -> bool:
    """Whether every group of `weight` [rows, columns] has at most `keep` weights that are not zero."""
    pattern.check_columns(weight.shape[-1])
    return bool(((weight.reshape(-1, pattern.of) != 0).sum(1) <= pattern.keep).all())


def _check_scores(scores: Tensor, count: int, most: int) -> None:
    if not 0 <= count <= most:
        raise ValueError(f"{count} of {most} weights cannot be removed")
    if scores.isnan().any():
        raise ValueError("scores hold NaN: the weights or the calibration statistics are broken")
