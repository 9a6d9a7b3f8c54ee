"""What each of a picture's 289 places shows: a loss that needs no language model, and so costs a tenth.

A visual token on a thing is drawn to the mean of the language model's own embeddings of the thing's name, against all other names.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.vision.efficientnet import Maps

SHARPNESS = 12.0


class Names:
    """The names of things as the language model embeds them, as directions from their common mean."""

    def __init__(self, names: list[str], tokenizer: PreTrainedTokenizerBase, embedding: Tensor) -> None:
        words = [embedding[tokenizer(f" {name}", add_special_tokens=False).input_ids].mean(0) for name in names]
        self.words = torch.stack(words)  # [names, width]
        self.center = self.words.mean(0)
        self.directions = F.normalize(self.words - self.center, dim=1)

    def logits(self, tokens: Tensor) -> Tensor:
        """Visual tokens [n, width] to [n, names]."""
        return F.normalize(tokens - self.center, dim=-1) @ self.directions.T * SHARPNESS


class Places:
    """Shards of pictures crowded with things: the maps, and the number of the thing at each place (0 is none)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[Path, tuple[Maps, Tensor]] = {}

    def refresh(self) -> None:
        """See the shards that came since."""
        for path in sorted(self.folder.glob("*.pt")):
            if path not in self._shards:
                shard = torch.load(path, weights_only=True, mmap=True)
                self._shards[path] = Maps(shard["fine"], shard["coarse"], shard["wide"]), shard["things"]

    def all(self, together: int) -> Iterator[tuple[Maps, Tensor]]:
        """All of them, so many at a time: maps, and int64 [n, 289]."""
        for maps, shown in self._shards.values():
            for n in range(0, len(shown), together):
                yield _some(maps, slice(n, n + together)), shown[n : n + together].flatten(1).long()

    def sample(self, rng: Random, count: int) -> tuple[Maps, Tensor]:
        maps, shown = self._shards[rng.choice(list(self._shards))]
        chosen = sorted(rng.sample(range(len(shown)), count))
        return _some(maps, chosen), shown[chosen].flatten(1).long()


def _some(maps: Maps, chosen: slice | list[int]) -> Maps:
    return Maps(maps.fine[chosen], maps.coarse[chosen], maps.wide[chosen])
