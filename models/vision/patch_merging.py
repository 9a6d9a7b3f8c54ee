"""Merge alike patches inside a vision transformer, so that its later layers run on fewer rows (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

ROUND = 1 / 8
"""Share of the patches that merge in a round. Half of them at once merges what is not alike: of `embedded`'s answers at half of the
patches 87 % stayed, and 99 % in rounds of an eighth."""


@dataclass(frozen=True)
class MergedRows:
    """Which row stands for each place of some pictures: `owner` [images, places], int64; and for how many places each row stands:
    `sizes` [images, rows], float32."""

    owner: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, keys: Tensor, keep: int, first: int) -> MergedRows:
        """The most alike places by their keys [images, places, dim] are merged until `keep` rows are left; those before `first`
        stay alone. ToMe merges a few in each layer; several rounds in one layer are ours."""
        images, places, _ = keys.shape
        alone = torch.ones(images, places, device=keys.device)
        merged = cls(torch.arange(places, device=keys.device).repeat(images, 1), alone)
        while (rows := merged.sizes.shape[1]) > keep:
            count = min(rows - keep, ceil((rows - first) * ROUND))
            owner = match(merged.means(keys), count, first).gather(1, merged.owner)
            merged = cls(owner, alone.new_zeros(images, rows - count).scatter_add(1, owner, alone))
        return merged

    def means(self, x: Tensor) -> Tensor:
        """Each row's mean of its places in x [images, places, width]: [images, rows, width]."""
        sums = self.sizes.new_zeros(*self.sizes.shape, x.shape[2])
        return (sums.scatter_add(1, self.owner[..., None].expand_as(x), x.float()) / self.sizes[..., None]).to(x.dtype)

    def unmerge(self, x: Tensor) -> Tensor:
        """Rows [images, rows, width] at all the places that they stand for: [images, places, width]."""
        return x.gather(1, self.owner[..., None].expand(-1, -1, x.shape[2]))


def match(keys: Tensor, count: int, first: int) -> Tensor:
    """The row that each row is in after `count` merges, int64 [images, rows]; those that stay keep their order.

    Bipartite soft matching (ToMe, section 3): of the rows from `first` on every second one may merge, into the one of the others
    whose key [images, rows, dim] is most alike by cosine; the `count` that are most alike do.
    """
    unit = F.normalize(keys.float(), dim=-1)
    likeness, nearest = (unit[:, first::2] @ unit[:, first + 1 :: 2].mT).max(-1)
    merged = likeness.topk(count).indices
    going, into = first + 2 * merged, first + 1 + 2 * nearest.gather(1, merged)
    row = torch.ones_like(unit[..., 0], dtype=torch.int64).scatter(1, going, 0).cumsum(1) - 1
    return row.scatter(1, going, row.gather(1, into))
