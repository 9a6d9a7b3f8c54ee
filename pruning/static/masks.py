"""Which weights of a matrix become zero, given a score for each: the lowest, compared over different sets of weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pattern = Literal["unstructured", "2:4"]
GROUP, ZEROS = 4, 2
"""Pattern 2:4: of every four neighbours in a row, two are zero."""


def lowest_per_row(scores: Tensor, nonzeros: int) -> Tensor:
    """The lowest scores of each row: bool [rows, columns], all but `nonzeros` of them True.

    Rows have equally many, or one more: comparing within rows is Wanda's finding (arXiv 2306.11695, section 3); the exact total is
    ours.
    """
    rows, columns = scores.shape
    zeros = rows * columns - nonzeros
    ends = torch.arange(1, rows + 1) * zeros // rows
    counts = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype)).to(scores.device)
    order = scores.argsort(dim=1, stable=True)
    ranked = torch.arange(columns, device=scores.device) < counts[:, None]
    return torch.zeros_like(ranked).scatter_(1, order, ranked)


def lowest_per_matrix(scores: Tensor, nonzeros: int) -> Tensor:
    """The lowest scores of the whole matrix: bool like `scores`, all but exactly `nonzeros` True; ties by position."""
    zeros = scores.numel() - nonzeros
    if not zeros:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    limit = flat.kthvalue(zeros).values  # a ninth of the time of sorting them
    lowest, tied = flat < limit, flat == limit
    lowest |= tied & (tied.cumsum(0) <= zeros - lowest.sum())
    return lowest.view_as(scores)


def lowest_per_group(scores: Tensor) -> Tensor:
    """Pattern 2:4: the two lowest scores of every four neighbours in a row, bool like `scores`."""
    rows, columns = scores.shape
    check_groups(columns)
    grouped = scores.view(rows, -1, GROUP)
    lowest = grouped.argsort(dim=2, stable=True)[..., :ZEROS]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, lowest, True).view(rows, columns)


def check_groups(columns: int) -> None:
    """Raises ValueError for rows that pattern 2:4 does not fit."""
    if columns % GROUP:
        raise ValueError(f"rows of {columns} weights do not divide into groups of {GROUP}, which pattern 2:4 needs")
