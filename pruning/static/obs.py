"""Optimal Brain Surgeon as SparseGPT does it (Frantar and Alistarh 2023, arXiv 2301.00774): remove the weights that cost least by
the inverse Hessian, and let the weights to their right make up for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.static.masks import GROUP, Pattern, check_groups, lowest_per_group, lowest_per_matrix

BLOCK_SIZE = 128
"""Columns whose mask is chosen together, and whose errors reach the columns to their right in one product."""
DAMPING = 0.01
"""Share of the mean diagonal that is added to the diagonal."""
RETRIES = 4


class HessianError(ValueError):
    """The statistics of a matrix cannot be used; the message says why and what to do."""


@dataclass
class Hessian:
    matrix: Tensor  # [in, in] float32, mean of 2 x xᵀ
    rows: int  # so far


@dataclass
class Factor:
    upper: Tensor  # [in, in]: U with UᵀU = H⁻¹
    dead: Tensor  # [in] bool: inputs that are always zero
    damping: float  # the share that was needed
    retries: int  # how often it had to be raised


def empty(columns: int, device: torch.device | str = "cpu") -> Hessian:
    return Hessian(torch.zeros(columns, columns, device=device), 0)


def accumulate(statistics: Hessian, rows: Tensor) -> None:
    """Add input rows x [n, in]."""
    statistics.rows += len(rows)
    scaled = rows.float() * torch.tensor(2 / statistics.rows).sqrt()
    statistics.matrix.mul_(1 - len(rows) / statistics.rows).addmm_(scaled.T, scaled)


def check(statistics: Hessian) -> None:
    """Raise HessianError when the Hessian is not finite or all zero."""
    if not statistics.matrix.isfinite().all():
        raise HessianError("the Hessian is not finite; calibrate in float32, or leave out the samples that overflow")
    if not statistics.matrix.diagonal().any():
        raise HessianError("the Hessian is zero: no calibration row reached this matrix")


def prepare(statistics: Hessian, damping: float = DAMPING) -> Factor:
    """Invert the damped Hessian and factorise the inverse; a singular one is tried again with ten times the damping.

    Raises HessianError when the Hessian is not finite, all zero, or singular after RETRIES.
    """
    check(statistics)
    matrix = statistics.matrix
    diagonal = matrix.diagonal()
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
        "use more calibration samples"
    )


def prune(weight: Tensor, factor: Factor, nonzeros: int, pattern: Pattern, block_size: int = BLOCK_SIZE) -> Tensor:
    """The weight [out, in] with `nonzeros` weights left, changed to make up for the others; in the dtype it came in.

    Per column i, from the left: what is removed leaves the error e = w / U_ii, and every column to its right changes by -e U_ij
    (SparseGPT, equations 3 and 4). A mask is chosen per block of columns by w² / U_ii²; with 2:4, within a group when the group
    begins. `block_size` is a multiple of the group there.
    """
    if pattern == "2:4":
        check_groups(weight.shape[1])
    pruned = weight.float().clone()
    columns = pruned.shape[1]
    upper = factor.upper
    for first in range(0, columns, block_size):
        last = min(first + block_size, columns)
        # Exact totals: each block has its share of the nonzeros, rounded so that the rounding never adds up.
        count = nonzeros * last // columns - nonzeros * first // columns
        dead = factor.dead[first:last]
        errors = _prune_columns(pruned[:, first:last], upper[first:last, first:last], dead, count, pattern)
        pruned[:, last:].addmm_(errors, upper[first:last, last:], alpha=-1)
    return pruned.to(weight.dtype)


def _prune_columns(part: Tensor, upper: Tensor, dead: Tensor, nonzeros: int, pattern: Pattern) -> Tensor:
    """Prune columns [out, block size] in place, those of dead inputs first; returns their errors [out, block size]."""
    diagonal = upper.diagonal()
    errors = torch.zeros_like(part)
    mask = torch.zeros_like(part, dtype=torch.bool)
    if pattern == "unstructured":
        mask = lowest_per_matrix((part / diagonal).square().masked_fill(dead, -1), nonzeros)
    for i in range(part.shape[1]):
        if pattern == "2:4" and i % GROUP == 0:
            group = slice(i, i + GROUP)
            saliency = (part[:, group] / diagonal[group]).square().masked_fill(dead[group], -1)
            mask[:, group] = lowest_per_group(saliency)
        error = part[:, i].masked_fill(~mask[:, i], 0) / diagonal[i]
        part[:, i:].addr_(error, upper[i, i:], alpha=-1)
        errors[:, i] = error
    # What was removed is zero but for rounding; nothing else may be, or the totals would not hold.
    part.masked_fill_(mask, 0)
    return errors
