"""Training-free choices of visual tokens. Each takes one image's features and says which tokens stay.

They need no attention scores from the language model, so they run before it; the learned router must beat them.
"""

from __future__ import annotations

from math import ceil
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

TokenPolicy = Literal["cls_diversity", "random", "uniform", "pooling"]
TOKEN_POLICIES: tuple[str, ...] = get_args(TokenPolicy)


def keep_tokens(policy: TokenPolicy, tokens: Tensor, attention: Tensor, keep: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose `keep` of an image's visual tokens: ascending indices [keep], and the tokens [visual_tokens, width] to use.

    `attention` [visual_tokens] is the class token's. Only `pooling` changes the tokens: each kept one becomes its cell's mean.
    """
    total = len(tokens)
    if keep >= total:
        return torch.arange(total, device=tokens.device), tokens
    if policy == "cls_diversity":
        return cls_diversity(tokens, attention, keep).sort().values, tokens
    if policy == "random":
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
        return order[:keep].sort().values.to(tokens.device), tokens
    if policy == "uniform":
        return uniform(total, keep).to(tokens.device), tokens
    return pooling(tokens, keep)


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


def pooling(tokens: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Average square cells of the grid; each cell's mean stands at its center's place. At most `keep` cells."""
    total = len(tokens)
    side = round(total**0.5)
    if side * side != total or not keep:
        indices = uniform(total, keep).to(tokens.device)
        return indices, tokens
    cell = next(c for c in range(1, side + 1) if ceil(side / c) ** 2 <= keep)
    grid = tokens.T.reshape(1, -1, side, side)
    means = F.avg_pool2d(grid.float(), cell, ceil_mode=True)[0].flatten(1).T.to(tokens.dtype)
    centers = [min(start + cell // 2, side - 1) for start in range(0, side, cell)]
    indices = torch.tensor([y * side + x for y in centers for x in centers], device=tokens.device)
    pooled = tokens.clone()
    pooled[indices] = means
    return indices, pooled
