"""Wanda (Sun et al. 2024, arXiv 2306.11695): |weight| times the norm of its input; what stays is not changed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.static.masks import Pattern, lowest_per_group, lowest_per_row


@dataclass
class InputNorms:
    squares: Tensor  # [in] float32, mean of x²
    rows: int  # so far


def empty(columns: int, device: torch.device | str = "cpu") -> InputNorms:
    return InputNorms(torch.zeros(columns, device=device), 0)


def accumulate(statistics: InputNorms, rows: Tensor) -> None:
    """Add input rows x [n, in]."""
    statistics.rows += len(rows)
    mean = rows.float().square().sum(0) / len(rows)
    statistics.squares += (mean - statistics.squares) * (len(rows) / statistics.rows)


def prepare(statistics: InputNorms) -> Tensor:
    """The norm of each input, [in]. Raises ValueError when one is not finite."""
    if not statistics.squares.isfinite().all():
        raise ValueError("the activations are not finite; calibrate in float32, or leave out the samples that overflow")
    return statistics.squares.sqrt()


def prune(weight: Tensor, norms: Tensor, nonzeros: int, pattern: Pattern) -> Tensor:
    """The weight [out, in] with `nonzeros` weights left, as they were."""
    scores = weight.float().abs() * norms
    return weight.masked_fill(lowest_per_group(scores) if pattern == "2:4" else lowest_per_row(scores, nonzeros), 0)
