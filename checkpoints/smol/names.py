"""Which thing each of a picture's places shows: a loss that needs no language model, and so costs a tenth of an answer's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

SHARPNESS = 12.0


class Names:
    """The names of things as the language model embeds them, as directions from their common mean.

    A visual token on a thing is drawn to the mean of the embeddings of the thing's name, against all other names.
    """

    def __init__(self, names: list[str], tokenizer: PreTrainedTokenizerBase, embedding: Tensor) -> None:
        words = [embedding[tokenizer(f" {name}", add_special_tokens=False).input_ids].float().mean(0) for name in names]
        self.center = torch.stack(words).mean(0)
        self.directions = F.normalize(torch.stack(words) - self.center, dim=1)

    def logits(self, tokens: Tensor) -> Tensor:
        """Visual tokens [n, width] to [n, names]."""
        return F.normalize(tokens.float() - self.center, dim=-1) @ self.directions.T * SHARPNESS
