"""What tests of the recipe share: the tokenizer, a mix that takes every question, and the conversations of a sequence."""

from __future__ import annotations

import numpy as np

from checkpoints.embedded.data import Mix
from tests.server.tiny import processor

TOKENIZER = processor().tokenizer
ALL = Mix(length=2000, long=1)


def conversations(packed: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each conversation with the prefix it sees, and nothing else."""
    numbers = range(1, packed["segments"].max() + 1)
    seen = [(packed["segments"] == 0) | (packed["segments"] == number) for number in numbers]
    return [{key: part[mask] for key, part in packed.items()} for mask in seen]
