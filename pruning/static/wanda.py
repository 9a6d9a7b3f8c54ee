"""Wanda (arXiv 2306.11695): a weight counts by its size times the norm of what it is multiplied with. No weight is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pruning.static.patterns import NM, Pruned, Target, smallest, smallest_of_groups, smallest_per_row


@dataclass
class Squares:
    """Running mean of each input's square over calibration rows: `mean` [columns], float32; `rows` is their total weight."""

    mean: Tensor
    rows: float = 0.0


def empty(columns: int, device: torch.device | str = "cpu") -> Squares:
    return Squares(torch.zeros(columns, device=device))


def accumulate(squares: Squares, x: Tensor, weights: Tensor | None = None) -> None:
    """Add the inputs x [rows, columns] of a matrix, in place; `weights` [rows], not negative, say how much each row counts."""
    added = float(len(x) if weights is None else weights.sum())
    if added == 0:
        return
    squared = x.float().square()
    total = squared.sum(0) if weights is None else weights.to(squared) @ squared
    squares.rows += added
    squares.mean += (total - added * squares.mean) / squares.rows


def solve(squares: Squares, weight: Tensor, targets: Sequence[Target], *, per: Literal["row", "matrix"] = "row") -> Pruned:
    """`weight` [rows, columns] at each target. Weights are compared within their output row, or over the whole `matrix`.

    Rows are Wanda's finding for language models; ECoFLaP's code takes the whole matrix in vision towers. ValueError where the
    statistics are empty or not finite.
    """
    scores = saliency(squares, weight)
    choose = smallest_per_row if per == "row" else smallest
    masks = (smallest_of_groups(scores, t) if isinstance(t, NM) else choose(scores, t) for t in targets)
    return Pruned([weight.masked_fill(gone, 0) for gone in masks])


def saliency(squares: Squares, weight: Tensor) -> Tensor:
    """|w| times the root mean square of its input, [rows, columns] in float32."""
    if squares.rows == 0:
        raise ValueError("no calibration rows reached this matrix")
    if not squares.mean.isfinite().all():
        raise ValueError("activations overflowed or are NaN in calibration; run it in bfloat16 or float32")
    return weight.float().abs() * squares.mean.sqrt()
