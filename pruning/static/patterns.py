"""Which weights may be zero together: any (`unstructured`), or n of every m in a row (`2:4`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unstructured:
    def __str__(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM:
    """At least `zeros` of every `group` neighbouring weights of a row are zero."""

    zeros: int
    group: int

    def __str__(self) -> str:
        return f"{self.zeros}:{self.group}"

    @property
    def sparsity(self) -> float:
        return self.zeros / self.group


Pattern = Unstructured | NM


def parse(text: str) -> Pattern:
    """`unstructured` or n:m. Raises ValueError for anything else."""
    if text == "unstructured":
        return Unstructured()
    if found := re.fullmatch(r"(\d+):(\d+)", text):
        zeros, group = map(int, found.groups())
        if 0 < zeros < group:
            return NM(zeros, group)
    raise ValueError(f"pattern {text!r} is not unstructured, structured or n:m with 0 < n < m, such as 2:4")


def dropped_in_rows(scores: Tensor, kept: int) -> Tensor:
    """Drop the lowest scores of each row: bool [rows, columns], True where dropped; `kept` weights stay in all.

    Rows lose equally many, or one more: comparing within rows is Wanda's finding (arXiv 2306.11695, section 3); the exact total is
    ours.
    """
    rows, columns = scores.shape
    drop = rows * columns - kept
    ends = torch.arange(1, rows + 1) * drop // rows
    counts = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype)).to(scores.device)
    order = scores.argsort(dim=1, stable=True)
    ranked = torch.arange(columns, device=scores.device) < counts[:, None]
    return torch.zeros_like(ranked).scatter_(1, order, ranked)


def dropped_in_all(scores: Tensor, kept: int) -> Tensor:
    """Drop the lowest scores of the whole matrix; exactly `kept` stay, ties by position."""
    flat = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    flat[scores.flatten().argsort(stable=True)[: scores.numel() - kept]] = True
    return flat.view_as(scores)


def dropped_in_groups(scores: Tensor, pattern: NM) -> Tensor:
    """Drop the lowest `zeros` scores of every group of neighbours in a row."""
    rows, columns = scores.shape
    if columns % pattern.group:
        raise ValueError(f"rows of {columns} weights do not divide into groups of {pattern.group}")
    grouped = scores.view(rows, -1, pattern.group)
    lowest = grouped.argsort(dim=2, stable=True)[..., : pattern.zeros]
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, lowest, True).view(rows, columns)


def kept_weights(numel: int, sparsity: float, pattern: Pattern) -> int:
    """How many of `numel` weights stay at a sparsity; a pattern of groups decides that itself."""
    return round(numel * (1 - (pattern.sparsity if isinstance(pattern, NM) else sparsity)))
