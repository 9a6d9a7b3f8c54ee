"""How many weights each matrix keeps: uniform, ECoFLaP's allocator, OWL's. Totals are exact."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Allocation = dict[str, int]
"""Nonzero weights by matrix."""
MARGIN = 0.1
"""ECoFLaP: a block may lose so much more than the sparsity asked for."""
OWL_RANGE = 0.08
"""OWL's λ: the most and the least pruned block differ by twice as much at most."""


def block_of(matrix: str) -> str:
    """`language.3` of `language.3.self_attn.q_proj`."""
    return ".".join(matrix.split(".")[:2])


def uniform(sizes: Mapping[str, int], sparsity: float) -> Allocation:
    """The same share of every matrix."""
    return apportion(sizes, {name: (1 - sparsity) * size for name, size in sizes.items()}, total(sizes, sparsity))


def ecoflap(sizes: Mapping[str, int], scores: Mapping[str, float], sparsity: float) -> Allocation:
    """ECoFLaP's allocator (Sung et al. 2024, arXiv 2310.02998): no block loses more than `sparsity` + MARGIN, and the rest of the
    budget is dealt in proportion to the blocks' scores; a block that is full gets no more.

    `scores` are per matrix and summed per block.
    """
    blocks, size = _block_sizes(sizes)
    score = np.array([sum(s for name, s in scores.items() if block_of(name) == block) for block in blocks], float)
    if not np.isfinite(score).all() or (score < 0).any() or not score.any():
        raise ValueError("the scores of the blocks are not finite and positive; score more samples, or in float32")
    nonzeros = size * (1 - min(sparsity + MARGIN, 1.0))
    wanted = total(sizes, sparsity)
    while (rest := wanted - nonzeros.sum()) > 0.5 and (open_ := nonzeros < size).any():
        share = np.where(open_, score, 0)
        if not share.any():  # only blocks of score zero are left: they share what is left by their size
            share = np.where(open_, size, 0)
        nonzeros = np.minimum(nonzeros + rest * share / share.sum(), size)
    return _within_blocks(sizes, dict(zip(blocks, nonzeros / size, strict=True)), wanted)


def owl(sizes: Mapping[str, int], outlier_ratios: Mapping[str, float], sparsity: float) -> Allocation:
    """OWL's allocator (Yin et al. 2024, arXiv 2310.05175): the more outliers a block has, the more it keeps, over a range of
    2 OWL_RANGE whose mean is the target."""
    blocks, size = _block_sizes(sizes)
    ratio = np.array([np.mean([r for name, r in outlier_ratios.items() if block_of(name) == block]) for block in blocks])
    spread = ratio.max() - ratio.min()
    density = 2 * OWL_RANGE * (ratio - ratio.min()) / spread if spread > 0 else np.zeros_like(ratio)
    density += (1 - sparsity) - np.average(density, weights=size)
    return _within_blocks(sizes, dict(zip(blocks, density.clip(0, 1), strict=True)), total(sizes, sparsity))


def total(sizes: Mapping[str, int], sparsity: float) -> int:
    """Nonzero weights of all matrices together."""
    return round(sum(sizes.values()) * (1 - sparsity))


def _block_sizes(sizes: Mapping[str, int]) -> tuple[list[str], np.ndarray]:
    blocks = sorted({block_of(name) for name in sizes})
    return blocks, np.array([sum(n for name, n in sizes.items() if block_of(name) == block) for block in blocks], float)


def _within_blocks(sizes: Mapping[str, int], density: Mapping[str, float], wanted: int) -> Allocation:
    """Every matrix of a block keeps the block's share."""
    return apportion(sizes, {name: density[block_of(name)] * size for name, size in sizes.items()}, wanted)


def apportion(sizes: Mapping[str, int], ideal: Mapping[str, float], wanted: int) -> Allocation:
    """Whole numbers near `ideal` that are within the sizes and sum to `wanted`."""
    ideal = {name: min(max(ideal[name], 0.0), size) for name, size in sizes.items()}
    if (excess := sum(ideal.values())) > wanted:  # clipping at zero has left too many
        ideal = {name: value * wanted / excess for name, value in ideal.items()}
    nonzeros = {name: int(value) for name, value in ideal.items()}
    missing = wanted - sum(nonzeros.values())
    while missing > 0:
        open_ = [name for name, size in sizes.items() if nonzeros[name] < size]
        for name in sorted(open_, key=lambda n: nonzeros[n] - ideal[n]):
            extra = min(max(missing // len(open_), 1), sizes[name] - nonzeros[name], missing)
            nonzeros[name] += extra
            missing -= extra
    for name in sorted(nonzeros, key=lambda n: ideal[n] - nonzeros[n])[: max(-missing, 0)]:  # rounding of the sum above
        nonzeros[name] -= 1
    return nonzeros
