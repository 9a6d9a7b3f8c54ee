"""The grounding loss: a word must attend to what it names."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from checkpoints.embedded.data import GRID, Packer, patch_labels
from checkpoints.embedded.grounding import GROUNDING_HEADS, WordClasses, grounding_loss
from checkpoints.world import Mark, Question
from tests.checkpoints.embedded.sequences import ALL, TOKENIZER

LAYERS = 1 + max(head.layer for head in GROUNDING_HEADS)


@pytest.mark.parametrize("pool", [1, 2])
def test_a_word_must_attend_to_what_it_names(pool, monkeypatch):
    """All attention on the first token costs nothing for a thing that is not there, and all there is for one that is."""
    mark = Mark((32, 32, 48, 48), "star", "red")
    packer = Packer(TOKENIZER, (GRID // pool) ** 2)
    visual = slice(packer.first_visual, packer.first_visual + packer.visual_tokens)

    def loss(question: str, on: int) -> float:
        packed = packer.pack([Question("any", question, "yes")], ALL, Random(0))
        batch = {key: torch.from_numpy(row)[None] for key, row in packed.items()}
        batch["patches"] = torch.from_numpy(patch_labels([mark]))[None]

        def looking(model: Any, head: Any, hidden: Any, rope: Any, row: torch.Tensor, at: torch.Tensor, mask: Any) -> Any:
            return F.one_hot(torch.full((len(at),), on), len(packed["ids"])).float()

        monkeypatch.setattr("checkpoints.embedded.grounding._attention", looking)
        states: Any = [None] * LAYERS
        nothing: Any = None
        return float(grounding_loss(nothing, states, batch, WordClasses(TOKENIZER), nothing, nothing, visual, pool))

    inside = visual.start + 4 // pool * (GRID // pool) + 4 // pool
    assert loss("Is there a red star?", inside) == pytest.approx(0)
    assert loss("Is there a red star?", 0) > 10
    assert loss("Is there a blue cross?", 0) == pytest.approx(0)
    assert loss("Is there a blue star?", 0) == pytest.approx(loss("Is there a red cross?", 0)), "one word of three is there"
