"""ALPS (Meng et al. 2024, arXiv 2406.07831): the mask and the weights that stay, found together by ADMM on what a matrix puts out.

Its squared error on the calibration rows is about half of what `obs` leaves, which decides column by column and never goes back.
Each matrix takes some thirty products with its Hessian's eigenvectors: ten times as long as `obs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pruning.static import obs
from pruning.static.masks import Pattern, check_groups, lowest_per_group, lowest_per_matrix
from pruning.static.obs import DAMPING, Hessian, HessianError

empty, accumulate = obs.empty, obs.accumulate

FIRST_PENALTY = 0.1
CHECK_EVERY, MOST_CHECKS = 3, 100
"""Steps between two looks at the mask, and how many looks at most."""
MOST_SOLVING, ENOUGH = 50, 1e-5
"""Steps in which the weights of a mask are solved for, at most, and the residual, beside the whole, at which they are."""
DEAD = 1e-6
"""What a weight of a dead input counts beside the least of the others: such weights go first."""
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""Where more than this share of the mask changed since the last look, the penalty grows by this. Where nothing did, it is found."""


@dataclass
class Spectrum:
    """The damped Hessian, its diagonal scaled to ones, [in, in]; its eigenvalues [in] and eigenvectors [in, in]; and what each
    input was scaled by, [in]."""

    matrix: Tensor
    values: Tensor
    vectors: Tensor
    scale: Tensor


def prepare(statistics: Hessian) -> Spectrum:
    """Raises HessianError when the Hessian is not finite, all zero or has no eigenvectors."""
    obs.check(statistics)
    matrix = statistics.matrix.clone()
    dead = matrix.diagonal() == 0
    matrix.diagonal().add_(dead.float() + DAMPING * matrix.diagonal().mean())
    scale = matrix.diagonal().sqrt()
    matrix /= scale[:, None] * scale
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError as error:
        raise HessianError(f"the Hessian has no eigenvectors ({error}); use more calibration samples") from error
    return Spectrum(matrix, values.clamp_min(0), vectors, scale.where(~dead, DEAD * scale[~dead].min()))


def prune(weight: Tensor, spectrum: Spectrum, nonzeros: int, pattern: Pattern) -> Tensor:
    """The weight [out, in] with `nonzeros` weights left, changed to make up for the others; in the dtype it came in.

    W, free, and D, sparse, are drawn together by a penalty that grows until the mask of D stays (paper, section 3.2); then its
    weights are solved for (paper, section 3.3).
    """
    if pattern == "2:4":
        check_groups(weight.shape[1])
    dense = weight.float() * spectrum.scale
    wanted = dense @ spectrum.matrix
    turned = wanted @ spectrum.vectors
    removed = _removed(dense, nonzeros, pattern)
    sparse, dual, penalty = dense.masked_fill(removed, 0), torch.zeros_like(dense), FIRST_PENALTY
    for _ in range(MOST_CHECKS):
        before = removed
        for _ in range(CHECK_EVERY):
            pull = (penalty * sparse - dual) @ spectrum.vectors
            free = ((turned + pull) / (spectrum.values + penalty)) @ spectrum.vectors.T
            drawn = free + dual / penalty
            removed = _removed(drawn, nonzeros, pattern)
            sparse = drawn.masked_fill(removed, 0)
            dual += penalty * (free - sparse)
        changed = int((removed ^ before).sum()) / max(1, nonzeros)
        if not changed:
            break
        penalty *= next(growth for share, growth in GROWTH if changed > share)
    return (_solved(sparse, ~removed, wanted, spectrum.matrix) / spectrum.scale).to(weight.dtype)


def _solved(weight: Tensor, kept: Tensor, wanted: Tensor, matrix: Tensor) -> Tensor:
    """The weight W [out, in] with W @ matrix = wanted where it is `kept`, and zero elsewhere: conjugate gradients, from `weight`
    on, for all rows together."""
    residual = (wanted - weight @ matrix) * kept
    direction, size = residual, residual.square().sum(1, keepdim=True)
    least = ENOUGH**2 * wanted.square().sum()
    for _ in range(MOST_SOLVING):
        if size.sum() <= least:
            break
        change = (direction @ matrix) * kept
        step = size / (direction * change).sum(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
        weight = weight + step * direction
        residual = residual - step * change
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp_min(torch.finfo(size.dtype).tiny) * direction
    return weight


def _removed(weight: Tensor, nonzeros: int, pattern: Pattern) -> Tensor:
    """bool [out, in]: the smallest weights, those that go."""
    return lowest_per_group(weight.abs()) if pattern == "2:4" else lowest_per_matrix(weight.abs(), nonzeros)
