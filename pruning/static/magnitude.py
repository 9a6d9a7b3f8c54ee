"""Magnitude pruning: the smallest weights of a matrix go. No statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from pruning.static.masks import Pattern, lowest_per_group, lowest_per_matrix


def empty(columns: int, device: torch.device | str = "cpu") -> None:
    return None


def accumulate(statistics: None, rows: Tensor) -> None:
    return None


def prepare(statistics: None) -> None:
    return None


def prune(weight: Tensor, prepared: None, nonzeros: int, pattern: Pattern) -> Tensor:
    """The weight [out, in] with `nonzeros` weights left, as they were."""
    scores = weight.float().abs()
    return weight.masked_fill(lowest_per_group(scores) if pattern == "2:4" else lowest_per_matrix(scores, nonzeros), 0)
