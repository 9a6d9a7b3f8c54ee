"""Choices of visual tokens that need no training: each takes one image's features and says which tokens stay.

They need no attention scores from the language model, so they run before it. `router`, the policy that is learned, is in `router`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

TokenPolicy = Literal["router", "merging", "divprune", "cls_diversity", "random", "uniform", "pooling"]
TOKEN_POLICIES: tuple[str, ...] = get_args(TokenPolicy)


@dataclass(frozen=True)
class Kept:
    """`indices` [keep], ascending; `tokens` [visual_tokens, width] to use; `sizes`, if any: how many each kept one stands for."""

    indices: Tensor
    tokens: Tensor
    sizes: tuple[int, ...] = ()


def keep_tokens(policy: TokenPolicy, tokens: Tensor, attention: Tensor, keep: int, seed: int) -> Kept:
    """Choose `keep` of an image's visual tokens [visual_tokens, width].

    `attention` [visual_tokens] is the class token's. `merging` and `pooling` change the kept tokens: each becomes a mean.
    """
    total = len(tokens)
    if keep >= total:
        return Kept(torch.arange(total, device=tokens.device), tokens)
    if policy == "merging":
        distance = euclidean(tokens)
        kept = farthest_first(distance, keep)
        shares = members(distance, kept)
        return replaced(tokens, kept, shares, means(tokens, shares))
    if policy == "divprune":
        return Kept(farthest_first(cosine(tokens), keep), tokens)
    if policy == "cls_diversity":
        return Kept(cls_diversity(tokens, attention, keep).sort().values, tokens)
    if policy == "random":
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        return Kept(order[:keep].sort().values.to(tokens.device), tokens)
    if policy == "uniform":
        return Kept(uniform(total, keep).to(tokens.device), tokens)
    if policy == "pooling":
        return pooling(tokens, keep)
    raise ValueError(f"policy {policy!r} needs what a router read")


def cls_diversity(tokens: Tensor, attention: Tensor, keep: int, salient: float = 0.5) -> Tensor:
    """Half by the class token's attention, the rest farthest-first from what is chosen (cosine distance).

    Ours, after VisPruner (arXiv 2412.01818: attention, then diversity) and DivPrune (2503.02175: max-min distance).
    """
    total = len(tokens)
    if keep >= total:
        return torch.arange(total, device=tokens.device)
    first = max(1, round(keep * salient)) if keep else 0
    chosen = attention.topk(first).indices
    unit = F.normalize(tokens.float(), dim=-1)
    similarity = unit @ unit.T
    if not first:
        return chosen
    nearest = similarity[chosen].max(0).values
    nearest[chosen] = torch.inf
    picks = [chosen]
    for _ in range(keep - first):
        pick = nearest.argmin()
        picks.append(pick[None])
        nearest = torch.maximum(nearest, similarity[pick])
        nearest[pick] = torch.inf
    return torch.cat(picks)


def uniform(total: int, keep: int) -> Tensor:
    """`keep` tokens spread evenly over the picture: a grid as near to square as the number allows."""
    side = round(total**0.5)
    if side * side != total:
        return torch.linspace(0, total - 1, keep).round().long()
    rows = max(1, min(side, round(keep**0.5)))
    kept = []
    for row in range(rows):
        columns = keep * (row + 1) // rows - keep * row // rows
        y = int((row + 0.5) * side / rows)
        kept += [y * side + int((column + 0.5) * side / columns) for column in range(columns)]
    return torch.tensor(sorted(set(kept)))


def pooling(tokens: Tensor, keep: int) -> Kept:
    """Average square cells of the grid; each cell's mean stands at its center's place. At most `keep` cells."""
    total = len(tokens)
    side = round(total**0.5)
    if side * side != total or not keep:
        indices = uniform(total, keep).to(tokens.device)
        return Kept(indices, tokens)
    cell = next(c for c in range(1, side + 1) if ceil(side / c) ** 2 <= keep)
    grid = tokens.T.reshape(1, -1, side, side)
    means = F.avg_pool2d(grid.float(), cell, ceil_mode=True)[0].flatten(1).T.to(tokens.dtype)
    centers = [min(start + cell // 2, side - 1) for start in range(0, side, cell)]
    indices = torch.tensor([y * side + x for y in centers for x in centers], device=tokens.device)
    pooled = tokens.clone()
    pooled[indices] = means
    return Kept(indices, pooled)


def euclidean(tokens: Tensor) -> Tensor:
    """Distances between tokens [..., n, width]: float32 [..., n, n]."""
    return torch.cdist(tokens.float(), tokens.float())


def cosine(tokens: Tensor) -> Tensor:
    """1 - cosine between tokens [..., n, width]: float32 [..., n, n]."""
    unit = F.normalize(tokens.float(), dim=-1)
    return 1 - unit @ unit.mT


def farthest_first(distance: Tensor, keep: int, weights: Tensor | None = None) -> Tensor:
    """`keep` tokens, each the farthest from those chosen before it (max-min distance, as in DivPrune, arXiv 2503.02175).

    distance [..., n, n]; `weights` [..., n] are logarithms that multiply it (ours): what matters is chosen sooner. Ascending
    indices [..., keep].
    """
    factor = torch.ones_like(distance[..., 0]) if weights is None else weights.exp()
    picks = [(factor * distance.sum(-2)).argmax(-1, keepdim=True)]
    nearest = torch.full_like(factor, torch.inf)
    for _ in range(keep - 1):
        latest = distance.take_along_dim(picks[-1][..., None], -2)[..., 0, :]
        nearest = torch.minimum(nearest, latest).scatter(-1, picks[-1], -1.0)  # never again
        picks.append((nearest * factor).argmax(-1, keepdim=True))
    return torch.cat(picks, -1).sort(-1).values


def members(distance: Tensor, kept: Tensor) -> Tensor:
    """Which token each kept one stands for, itself and those that are nearer to it than to other kept ones.

    distance [..., n, n], kept [..., keep]; 0 or 1, float32 [..., n, keep], one 1 in every row.
    """
    owner = distance.take_along_dim(kept[..., None, :], -1).argmin(-1)
    places = torch.arange(kept.shape[-1], device=kept.device).expand_as(kept)
    return F.one_hot(owner.scatter(-1, kept, places), kept.shape[-1]).float()


def means(tokens: Tensor, shares: Tensor) -> Tensor:
    """Mean of the tokens [..., n, width] that each kept one stands for: float32 [..., keep, width]. Sums of ones are exact in any
    dtype, so the product may be of the tokens' own."""
    sums = shares.to(tokens.dtype).mT @ tokens
    return sums.float() / shares.sum(-2)[..., None]


def replaced(tokens: Tensor, kept: Tensor, shares: Tensor, values: Tensor) -> Kept:
    """The kept tokens of one picture as `values` [keep, width], at their own places, with the number of tokens they stand for.

    With their sizes the picture weighs in attention what it weighed before (ToMe, arXiv 2210.09461).
    """
    out = tokens.clone()
    out[kept] = values.to(tokens.dtype)
    return Kept(kept, out, tuple(shares.sum(-2).long().tolist()))
