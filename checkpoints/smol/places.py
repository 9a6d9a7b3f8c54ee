"""What each of a picture's 289 places shows: a loss that needs no language model, and so costs a tenth.

A visual token on a thing is drawn to the mean of the language model's own embeddings of the thing's name, against all other names.
"""

from __future__ import annotations

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
        self.center = torch.stack(words).mean(0)
        self.directions = F.normalize(torch.stack(words) - self.center, dim=1)

    def logits(self, tokens: Tensor) -> Tensor:
        """Visual tokens [n, width] to [n, names]."""
        return F.normalize(tokens - self.center, dim=-1) @ self.directions.T * SHARPNESS


class Places:
    """Shards of pictures crowded with things: the maps, and the number of the thing at each place (0 is none)."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._shards = folder, {}  # type: ignore[var-annotated]

    def refresh(self) -> int:
        for path in sorted(self.folder.glob("*.pt")):
            if path not in self._shards and path.with_suffix(".wide").exists():
                wide = torch.load(path.with_suffix(".wide"), weights_only=True, mmap=True)
                self._shards[path] = (*torch.load(path, weights_only=True, mmap=True), wide)
        return sum(len(shard[2]) for shard in self._shards.values())

    def sample(self, rng: Random, count: int) -> tuple[Maps, Tensor]:
        fine, coarse, things, wide = self._shards[rng.choice(list(self._shards))]
        chosen = sorted(rng.sample(range(len(things)), count))
        return Maps(fine[chosen], coarse[chosen], wide[chosen]), things[chosen].flatten(1).long()
