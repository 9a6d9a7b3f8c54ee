"""Optimal brain surgeon on whole matrices: which weights may go, and how the others make up for them (SparseGPT, arXiv 2301.00774).

A matrix W with inputs x loses mean |(W' - W) x|² = tr((W' - W) H (W' - W)ᵀ), where H is the running mean of x xᵀ. Columns are settled one after
another; a weight that goes is made up for by the columns of its row that are not settled yet. Two things are ours. Columns are settled
from the weakest input to the strongest, so that what is left to make up for the others has the most to do it with. And how many
weights a block of columns loses is not the same for all blocks: it is what one comparison over the whole matrix says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import lcm
from typing import Literal

import torch
from torch import Tensor

from pruning.static.patterns import NM, Pruned, Target, smallest, smallest_of_groups

DAMPING = 0.01  # of the mean diagonal; SparseGPT's
BLOCK = 32  # columns that are compared together; half to a third of the error of SparseGPT's 128 on small models
RETRIES = 5  # each with ten times the damping


class SingularHessian(ValueError):
    """The inputs' second moments could not be factorised, whatever the damping."""


@dataclass
class Hessian:
    """Running mean of x xᵀ over calibration rows: `mean` [columns, columns], float32; `rows` is their total weight."""

    mean: Tensor
    rows: float = 0.0


def empty(columns: int, device: torch.device | str = "cpu") -> Hessian:
    return Hessian(torch.zeros(columns, columns, device=device))


def accumulate(hessian: Hessian, x: Tensor, weights: Tensor | None = None) -> None:
    """Add the inputs x [rows, columns] of a matrix, in place; `weights` [rows], not negative, say how much each row counts."""
    added = float(len(x) if weights is None else weights.sum())
    if added == 0:
        return
    x = x.to(hessian.mean)
    if weights is not None:
        x = x * weights.to(x).sqrt()[:, None]
    before, hessian.rows = hessian.rows, hessian.rows + added
    hessian.mean.addmm_(x.T, x, beta=before / hessian.rows, alpha=1 / hessian.rows)


@dataclass(frozen=True)
class Factor:
    """A damped Hessian made ready for any number of targets: H[order, order] + damping = L Lᵀ, and `inverse` is 1 / L.

    A leading block of L factorises the leading block of H, so once the columns behind i are settled, row i of `inverse` says how the
    columns before i make up for a change of column i. `dead` [columns] marks, in that order, inputs that are always zero; they touch
    no other column.
    """

    inverse: Tensor  # [columns, columns], lower triangular
    order: Tensor  # [columns], settled from the last to the first
    dead: Tensor
    damping: float
    retries: int


def factorise(
    hessian: Hessian, damping: float = DAMPING, *, order: Literal["energy", "given"] = "energy", group: int = 1
) -> Factor:
    """Factorise H + damping x (mean of its diagonal). `group` neighbours stay side by side in the order, as n:m wants.

    A factorisation that fails, or whose pivots are lost in rounding, is repeated with ten times the damping, and the factor says how
    often and what was used. ValueError for a Hessian that is not finite, empty or all zero; SingularHessian when retries do not help.
    """
    _check(hessian, damping)
    energy = hessian.mean.diagonal()
    dead = energy == 0
    scale = energy[~dead].mean()
    columns = _columns_by_energy(energy, group) if order == "energy" else torch.arange(len(energy), device=energy.device)
    system = hessian.mean[columns[:, None], columns]
    system.diagonal()[dead[columns]] = scale
    added = 0.0
    for retry in range(RETRIES + 1):
        system.diagonal().add_((damping - added) * scale)
        inverse = _inverse_factor(system)
        if inverse is not None:
            return Factor(inverse, columns, dead[columns], damping, retry)
        added, damping = damping, max(10 * damping, 1e-4)
    raise SingularHessian(
        f"the Hessian of {len(energy)} inputs over {hessian.rows:g} calibration rows is not positive definite, even with "
        f"{added:g} of its mean diagonal added; use more samples"
    )


def _check(hessian: Hessian, damping: float) -> None:
    if not damping >= 0:
        raise ValueError(f"damping {damping} must not be negative")
    if hessian.rows == 0:
        raise ValueError("no calibration rows reached this matrix")
    broken = int((~hessian.mean.isfinite()).sum())
    if broken:
        raise ValueError(
            f"the Hessian has {broken} entries that are not finite: activations overflowed or are NaN; run in bfloat16 or float32"
        )
    if not hessian.mean.diagonal().any():
        raise ValueError("every input of this matrix is zero on all calibration rows")


def _columns_by_energy(energy: Tensor, group: int) -> Tensor:
    """Falling energy: the last are settled first."""
    groups = energy.view(-1, group).sum(1).argsort(descending=True, stable=True)
    return (groups[:, None] * group + torch.arange(group, device=energy.device)).flatten()


def _inverse_factor(system: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(system)
    pivots = lower.diagonal().square()
    noise = 16 * torch.finfo(system.dtype).eps * system.diagonal()
    if failed or not bool((pivots > noise).all()):
        return None
    return torch.linalg.solve_triangular(lower, torch.eye(len(system), dtype=lower.dtype, device=lower.device), upper=False)


def solve(
    hessian: Hessian, weight: Tensor, targets: Sequence[Target], *, damping: float = DAMPING, block: int = BLOCK,
    order: Literal["energy", "given"] = "energy", compare: Literal["matrix", "block"] = "matrix",
) -> Pruned:  # fmt: skip
    """`weight` [rows, columns] at each target, all from one factorisation. Errors as in `factorise`.

    order="given", compare="block" and block=128 are SparseGPT as published, columns settled from the last to the first.
    """
    group = lcm(*(target.of for target in targets if isinstance(target, NM)))
    factor = factorise(hessian, damping, order=order, group=group)
    solved = [prune(weight, factor, target, block=block, compare=compare) for target in targets]
    return Pruned(solved, factor.damping, factor.retries)


def prune(
    weight: Tensor, factor: Factor, target: Target, *, block: int = BLOCK, compare: Literal["matrix", "block"] = "matrix"
) -> Tensor:
    """`weight` [rows, columns], or any of its rows, at one target; same dtype. The input is left alone.

    Weights are compared within `block` columns, rows against rows. A block loses as many as belong to the smallest of the whole matrix
    before any is changed, or (compare="block") its even share. Weights on dead inputs go first, and those that stay are unchanged.
    """
    work = weight.to(factor.inverse.dtype)[:, factor.order].T.contiguous()  # [columns, rows]: a column lies in one piece
    columns = len(work)
    step = block if isinstance(target, int) else max(target.of, block - block % target.of)
    counts = _lost_per_column(_saliency(work, factor, slice(0, columns)), target, compare)
    for stop in range(columns, 0, -step):
        here = slice(max(0, stop - step), stop)
        _settle(work, factor, here, target if isinstance(target, NM) else int(counts[here].sum()))
    pruned = torch.empty_like(weight)
    pruned[:, factor.order] = work.T.to(weight.dtype)
    return pruned


def _saliency(work: Tensor, factor: Factor, here: slice) -> Tensor:
    """What each weight of the columns `here` costs if it goes and the columns before it make up for it (OBS); [columns, rows]."""
    scores = (work[here] * factor.inverse.diagonal()[here, None].reciprocal()).square()
    scores[factor.dead[here]] = -1
    return scores


def _lost_per_column(scores: Tensor, target: Target, compare: str) -> Tensor:
    """How many weights each column shall lose, int64 [columns]; only the sums over blocks are used. Of no matter for n:m."""
    columns = len(scores)
    if isinstance(target, NM):
        target.check_columns(columns)
        return torch.zeros(columns, dtype=torch.long)
    if compare == "matrix":
        return smallest(scores, target).sum(1).cpu()
    ends = target * torch.arange(columns + 1) // columns
    return ends.diff()


def _settle(work: Tensor, factor: Factor, here: slice, target: Target) -> None:
    """Settle the columns `here` of `work` [columns, rows], last first, and let the columns before them make up for it."""
    inverse, block = factor.inverse[here, here], work[here]
    pattern = target if isinstance(target, NM) else None
    gone = torch.zeros_like(block, dtype=torch.bool) if pattern else smallest(_saliency(work, factor, here), int(target))  # type: ignore[call-overload]
    errors = torch.zeros_like(block)
    for i in reversed(range(len(block))):
        if pattern and (i + 1) % pattern.of == 0:  # weights are compared as they are by now, in whole groups
            first = i + 1 - pattern.of
            scores = _saliency(work, factor, slice(here.start + first, here.start + i + 1))
            gone[first : i + 1] = smallest_of_groups(scores.T, pattern).T
        errors[i] = torch.where(gone[i], block[i] / inverse[i, i], 0)
        block[i].masked_fill_(gone[i], 0)
        block[:i].addr_(inverse[i, :i], errors[i], alpha=-1)
    work[: here.start].addmm_(factor.inverse[here, : here.start].T, errors, alpha=-1)


def output_error(hessian: Hessian, weight: Tensor, pruned: Tensor) -> float:
    """Mean squared change of the outputs over their mean square, on the calibration rows: 0 is untouched, 1 is all zero."""
    dense = weight.to(hessian.mean)
    change = pruned.to(hessian.mean) - dense
    lost, whole = (float(((m @ hessian.mean) * m).sum()) for m in (change, dense))
    return lost / whole if whole else 0.0
