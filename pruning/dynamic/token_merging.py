"""Merge visual tokens: some stay, and each becomes the mean of those that it stands for. It needs no training.

It needs no attention scores from the language model, so it runs before it. The router merges by the same functions, with scores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class KeptTokens:
    """`indices` [keep], ascending; `tokens` [visual tokens, width] to use; `sizes`, if any: how many each kept one stands for."""

    indices: Tensor
    tokens: Tensor
    sizes: tuple[int, ...] = ()

    @classmethod
    def all(cls, tokens: Tensor) -> KeptTokens:
        return cls(torch.arange(len(tokens), device=tokens.device), tokens)


def merge_tokens(tokens: Tensor, keep: int) -> KeptTokens:
    """Keep `keep` of an image's visual tokens [visual tokens, width], farthest-first, and merge the others into them."""
    if keep >= len(tokens):
        return KeptTokens.all(tokens)
    kept, shares = choose_tokens(tokens, keep)
    return replaced(tokens, kept, shares, means(tokens, shares))


def choose_tokens(tokens: Tensor, keep: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which `keep` of tokens [..., n, width] stay, [..., keep] (see `farthest_first`), and what each stands for, [..., n, keep]."""
    distance = euclidean(tokens)
    kept = farthest_first(distance, keep, weights)
    return kept, members(distance, kept)


def euclidean(tokens: Tensor) -> Tensor:
    """Distances between tokens [..., n, width]: float32 [..., n, n]."""
    return torch.cdist(tokens.float(), tokens.float())


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
    """Which token each kept one stands for: itself, and those that are nearer to it than to other kept ones.

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


def replaced(tokens: Tensor, kept: Tensor, shares: Tensor, values: Tensor) -> KeptTokens:
    """The kept tokens of one picture as `values` [keep, width], at their own places, with the number of tokens they stand for.

    With their sizes the picture weighs in attention what it weighed before (ToMe, arXiv 2210.09461).
    """
    out = tokens.clone()
    out[kept] = values.to(tokens.dtype)
    return KeptTokens(kept, out, tuple(shares.sum(-2).long().tolist()))
