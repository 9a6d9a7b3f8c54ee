"""Magnitude pruning: the smallest weights go. Needs no data; the baseline that everything else must beat."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pruning.static.patterns import NM, Pruned, Target, smallest, smallest_of_groups


def empty(columns: int, device: torch.device | str = "cpu") -> None:
    """Nothing is measured."""


def accumulate(statistics: None, x: Tensor, weights: Tensor | None = None) -> None:
    """Nothing is measured."""


def solve(statistics: None, weight: Tensor, targets: Sequence[Target]) -> Pruned:
    """`weight` [rows, columns] at each target, compared over the whole matrix (n:m: within each group)."""
    scores = weight.float().abs()
    masks = (smallest_of_groups(scores, t) if isinstance(t, NM) else smallest(scores, t) for t in targets)
    return Pruned([weight.masked_fill(gone, 0) for gone in masks])
