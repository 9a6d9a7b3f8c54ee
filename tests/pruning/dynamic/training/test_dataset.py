"""Which questions a router learns from and which it is measured on, and what is kept of each."""

from __future__ import annotations

import torch

from models.checkpoint import load
from tests.pruning.dynamic.tiny_router import QUICK, plain_checkpoint, router_dataset  # noqa: F401


def test_a_quarter_of_questions_follows_the_models_own_answer(plain, data):
    decode = load(plain).preprocessor.tokenizer.decode
    prompts = [decode(prompt[prompt >= 0]) for prompt in data.prompt[data.picture == 0]]
    assert [prompt.count("ASSISTANT") for prompt in prompts] == [1, 1, 1, 2]
    spoken = decode(data.answer[0][data.answer[0] >= 0], skip_special_tokens=True).strip()
    assert spoken in prompts[3]
    assert prompts[0].removesuffix(" ASSISTANT:").removeprefix("<s>") in prompts[3]
    assert data.follow_up[data.picture == 0].tolist() == [False, False, False, True]


def test_a_held_out_picture_is_asked_all_first_and_following(plain, data):
    decode = load(plain).preprocessor.tokenizer.decode
    held = data.picture == QUICK["pictures"] - 1
    prompts = [decode(prompt[prompt >= 0]) for prompt in data.prompt[held]]
    assert data.follow_up[held].tolist() == [False] * 4 + [True] * 3
    for number, prompt in enumerate(prompts[4:]):
        assert prompt.endswith(prompts[number + 1].removeprefix("<s>USER: \n"))
        assert prompts[number].removesuffix(" ASSISTANT:") in prompt


def test_likely_tokens_and_the_rest_are_a_distribution(data):
    there = data.answer >= 0
    torch.testing.assert_close(data.log_probabilities[there].exp().sum(-1), torch.ones(int(there.sum())), rtol=1e-3, atol=1e-3)
    assert torch.equal(data.top_tokens[there][:, 0].long(), data.answer[there]), "the model says what it finds most likely"
