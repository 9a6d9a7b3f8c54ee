"""Wanda (Sun et al. 2024, arXiv 2306.11695): |weight| times the norm of what it is multiplied with; no update of what stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.static.patterns import NM, Pattern, dropped_in_groups, dropped_in_rows


@dataclass
class Norms:
    squares: Tensor  # [in] float32, weighted mean of x²
    total: float  # the sum of weights so far


def empty(columns: int, device: torch.device | str = "cpu") -> Norms:
    return Norms(torch.zeros(columns, device=device), 0.0)


def accumulate(statistics: Norms, rows: Tensor, weights: Tensor) -> None:
    """Add input rows x [n, in], each counting `weights` [n]."""
    added = float(weights.sum())
    statistics.total += added
    mean = (rows.float().square() * weights[:, None]).sum(0) / max(added, 1e-12)
    statistics.squares += (mean - statistics.squares) * (added / statistics.total)


def prepare(statistics: Norms) -> Tensor:
    """The norm of each input, [in]. Raises ValueError when one is not finite."""
    if not statistics.squares.isfinite().all():
        raise ValueError("the activations are not finite; calibrate in float32, or leave out the samples that overflow")
    return statistics.squares.sqrt()


def solve(weight: Tensor, norms: Tensor, kept: int, pattern: Pattern) -> Tensor:
    """The weight [out, in] with `kept` weights left, as they were."""
    scores = weight.float().abs() * norms
    dropped = dropped_in_groups(scores, pattern) if isinstance(pattern, NM) else dropped_in_rows(scores, kept)
    return weight.masked_fill(dropped, 0)
