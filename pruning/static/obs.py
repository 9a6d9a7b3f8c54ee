"""Optimal Brain Surgeon, as SparseGPT does it (Frantar and Alistarh 2023, arXiv 2301.00774): drop what costs least by the inverse
Hessian, and let the weights to the right make up for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.static.patterns import NM, Pattern, dropped_in_all, dropped_in_groups

BLOCK = 128
"""Columns whose mask is chosen together, and whose errors reach the columns to their right in one product."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal."""
RETRIES = 4


class HessianError(ValueError):
    """The statistics of a matrix cannot be used; the message says why and what to do."""


@dataclass
class Hessian:
    matrix: Tensor  # [in, in] float32, weighted mean of 2 x xᵀ
    total: float  # the sum of weights so far


@dataclass
class Factor:
    upper: Tensor  # [in, in]: U with UᵀU = H⁻¹
    dead: Tensor  # [in] bool: inputs that are always zero
    damping: float  # the share that was needed
    retries: int  # how often it had to be raised


def empty(columns: int, device: torch.device | str = "cpu") -> Hessian:
    return Hessian(torch.zeros(columns, columns, device=device), 0.0)


def accumulate(statistics: Hessian, rows: Tensor, weights: Tensor) -> None:
    """Add input rows x [n, in], each counting `weights` [n]."""
    added = float(weights.sum())
    statistics.total += added
    scaled = rows.float() * (2 * weights[:, None] / statistics.total).sqrt()
    statistics.matrix.mul_(1 - added / statistics.total).addmm_(scaled.T, scaled)


def prepare(statistics: Hessian, damping: float = DAMPING) -> Factor:
    """Invert the damped Hessian and factorise the inverse; a singular one is tried again with ten times the damping.

    Raises HessianError when the Hessian is not finite, all zero, or singular after RETRIES.
    """
    matrix = statistics.matrix
    if not matrix.isfinite().all():
        raise HessianError("the Hessian is not finite; calibrate in float32, or leave out the samples that overflow")
    diagonal = matrix.diagonal()
    if not diagonal.any():
        raise HessianError("the Hessian is zero: no calibration row reached this matrix")
    dead = diagonal == 0
    for attempt in range(RETRIES):
        used = damping * 10**attempt
        damped = matrix.clone()
        damped.diagonal().add_(dead.float() + used * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower)
        upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and upper.isfinite().all():
            return Factor(upper, dead, used, attempt)
    raise HessianError(
        f"the Hessian stays singular with {damping * 10 ** (RETRIES - 1):g} of its mean diagonal added; "
        "use more calibration samples or a larger damping"
    )


def solve(weight: Tensor, factor: Factor, kept: int, pattern: Pattern, block: int = BLOCK) -> Tensor:
    """The weight [out, in] with `kept` weights left, the others moved to make up for it; in the dtype it came in.

    Per column i, from the left: what is dropped leaves the error e = w / U_ii, and every column to its right moves by -e U_ij
    (SparseGPT, equations 3 and 4). A mask is chosen per block of columns by w² / U_ii²; within a group of n:m when the group
    begins.
    """
    if isinstance(pattern, NM):
        if weight.shape[1] % pattern.group:
            raise ValueError(f"rows of {weight.shape[1]} weights do not divide into groups of {pattern.group}")
        block = max(block // pattern.group, 1) * pattern.group
    left = weight.float().clone()
    columns = left.shape[1]
    upper = factor.upper
    for first in range(0, columns, block):
        last = min(first + block, columns)
        # Exact totals: each block keeps its share of what is kept, rounded so that the rounding never adds up.
        count = kept * last // columns - kept * first // columns
        dead = factor.dead[first:last]
        errors = _prune_block(left[:, first:last], upper[first:last, first:last], dead, count, pattern)
        left[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return left.to(weight.dtype)


def _prune_block(part: Tensor, upper: Tensor, dead: Tensor, kept: int, pattern: Pattern) -> Tensor:
    """Prune columns [out, block] in place, those of dead inputs first; returns their errors [out, block]."""
    diagonal = upper.diagonal()
    errors = torch.zeros_like(part)
    mask = torch.zeros_like(part, dtype=torch.bool)
    if not isinstance(pattern, NM):
        mask = dropped_in_all((part / diagonal).square().masked_fill(dead, -1), kept)
    for i in range(part.shape[1]):
        if isinstance(pattern, NM) and i % pattern.group == 0:
            here = slice(i, i + pattern.group)
            saliency = (part[:, here] / diagonal[here]).square().masked_fill(dead[here], -1)
            mask[:, here] = dropped_in_groups(saliency, pattern)
        error = part[:, i].masked_fill(~mask[:, i], 0) / diagonal[i]
        part[:, i:].addr_(error, upper[i, i:], alpha=-1)
        errors[:, i] = error
    # What was dropped is zero but for rounding; nothing else may be, or the totals would not hold.
    part.masked_fill_(mask, 0)
    return errors
