"""How many weights each matrix keeps: uniform, ECoFLaP's allocator, OWL's. Totals are exact."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Kept = dict[str, int]
"""Weights to keep, by matrix."""


def block_of(matrix: str) -> str:
    """`language.3` of `language.3.self_attn.q_proj`."""
    return ".".join(matrix.split(".")[:2])


def uniform(sizes: Mapping[str, int], sparsity: float) -> Kept:
    """The same share of every matrix."""
    return apportion(sizes, {name: (1 - sparsity) * size for name, size in sizes.items()}, target(sizes, sparsity))


def ecoflap(sizes: Mapping[str, int], scores: Mapping[str, float], sparsity: float, maximum: float, average: bool = False) -> Kept:
    """ECoFLaP's allocator (Sung et al. 2024, arXiv 2310.02998): every block keeps at least 1 - `maximum`, and the rest of the
    budget is dealt in proportion to the blocks' scores; a block that is full leaves the game.

    `scores` are per matrix and summed per block, or with `average` divided by the block's size.
    """
    blocks = sorted({block_of(name) for name in sizes})
    size = np.array([sum(n for name, n in sizes.items() if block_of(name) == block) for block in blocks], float)
    score = np.array([sum(s for name, s in scores.items() if block_of(name) == block) for block in blocks], float)
    if not np.isfinite(score).all() or (score < 0).any() or not score.any():
        raise ValueError("the scores of the blocks are not finite and positive; score more samples, or in float32")
    if average:
        score = score / size
    keep = size * (1 - min(maximum, 1.0))
    wanted = target(sizes, sparsity)
    while (rest := wanted - keep.sum()) > 0.5 and (open_ := keep < size).any():
        share = np.where(open_, score, 0)
        if not share.any():  # only blocks of score zero are left: they share what is left by their size
            share = np.where(open_, size, 0)
        keep = np.minimum(keep + rest * share / share.sum(), size)
    return _spread(sizes, dict(zip(blocks, keep / size, strict=True)), wanted)


def owl(sizes: Mapping[str, int], outliers: Mapping[str, float], sparsity: float, spread: float = 0.08) -> Kept:
    """OWL's allocator (Yin et al. 2024, arXiv 2310.05175): the more outliers a block has, the more it keeps, over a range of
    2 `spread` whose mean is the target."""
    blocks = sorted({block_of(name) for name in sizes})
    size = np.array([sum(n for name, n in sizes.items() if block_of(name) == block) for block in blocks], float)
    ratio = np.array([np.mean([o for name, o in outliers.items() if block_of(name) == block]) for block in blocks])
    width = ratio.max() - ratio.min()
    keep = 2 * spread * (ratio - ratio.min()) / width if width > 0 else np.zeros_like(ratio)
    keep += (1 - sparsity) - np.average(keep, weights=size)
    return _spread(sizes, dict(zip(blocks, keep.clip(0, 1), strict=True)), target(sizes, sparsity))


def target(sizes: Mapping[str, int], sparsity: float) -> int:
    return round(sum(sizes.values()) * (1 - sparsity))


def _spread(sizes: Mapping[str, int], share: Mapping[str, float], wanted: int) -> Kept:
    """Every matrix of a block keeps the block's share."""
    return apportion(sizes, {name: share[block_of(name)] * size for name, size in sizes.items()}, wanted)


def apportion(sizes: Mapping[str, int], ideal: Mapping[str, float], wanted: int) -> Kept:
    """Whole numbers near `ideal` that are within the sizes and sum to `wanted`."""
    ideal = {name: min(max(ideal[name], 0.0), size) for name, size in sizes.items()}
    if (total := sum(ideal.values())) > wanted:  # clipping at zero has left too many
        ideal = {name: value * wanted / total for name, value in ideal.items()}
    kept = {name: int(value) for name, value in ideal.items()}
    missing = wanted - sum(kept.values())
    while missing > 0:
        open_ = [name for name, size in sizes.items() if kept[name] < size]
        for name in sorted(open_, key=lambda n: kept[n] - ideal[n]):
            extra = min(max(missing // len(open_), 1), sizes[name] - kept[name], missing)
            kept[name] += extra
            missing -= extra
    for name in sorted(kept, key=lambda n: ideal[n] - kept[n])[: max(-missing, 0)]:  # rounding of the sum above
        kept[name] -= 1
    return kept
