"""The model's own answers, from which samples are made."""

from __future__ import annotations

import torch

from models.route import Route
from pruning.answers import Prompt, generate, log_probabilities
from tests.models.tiny_llava import IMAGE, VISUAL, pair, prompt


def test_an_answer_holds_no_image():
    """Its token would be taken for a place of the picture's."""
    _, model = pair()
    ids, visual = prompt(1, 4, seed=0), torch.randn(VISUAL, model.config.text_config.hidden_size)
    model.head.bias = torch.eye(len(model.embedding))[IMAGE] * 100
    (said,) = generate(model, [Prompt(ids, visual)], (2,), 4)
    assert IMAGE not in said and len(said) <= 4
    assert log_probabilities(model, [Prompt(ids, visual)], [said], [Route.full(VISUAL, model.num_layers)])[0].isfinite().all()
