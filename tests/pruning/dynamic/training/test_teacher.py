"""What the un-pruned model is asked for: its answers, its attention, and what frozen layers cost it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from models.checkpoint import load
from models.route import Route
from pruning.answers import generate, log_probabilities
from pruning.dynamic.training.teacher import freezing_costs, margins, observe
from tests.pruning.dynamic.tiny_router import plain_checkpoint, prompt_of  # noqa: F401
from tests.server.tiny import LAYERS, VISUAL, answer, ask, new_engine


def test_attention_is_the_most_that_transformers_computes(plain):
    checkpoint = load(plain)
    prompts, answers = [prompt_of(checkpoint), prompt_of(checkpoint, "How many?", 1)], [[40, 41, 42], [43, 44]]
    reference = LlavaForConditionalGeneration.from_pretrained(plain, attn_implementation="eager")
    said, attention = observe(checkpoint.model, prompts, answers)
    for number, (prompt, own) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor([[*prompt.ids, *own[:-1]]])
        pixels = ask(new_engine(checkpoint), (number,)).images[0].picture.pixels
        with torch.no_grad():
            out = reference(input_ids=ids, pixel_values=pixels, output_attentions=True)
        visual = (ids[0] == reference.config.image_token_id).nonzero()[:, 0]
        behind = torch.arange(int(visual[-1]) + 1, ids.shape[1])
        wanted = torch.cat(out.attentions)[:, :, behind][..., visual].amax((0, 1, 2))
        torch.testing.assert_close(attention[number], wanted, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(said[number], out.logits[0, -len(own) :].log_softmax(-1), rtol=1e-3, atol=1e-3)


def test_answers_are_what_the_engine_says_at_level_off(plain):
    checkpoint = load(plain)
    answers = generate(checkpoint.model, [prompt_of(checkpoint, picture=i) for i in range(2)], checkpoint.eos, 6)
    decode = checkpoint.preprocessor.tokenizer.decode
    for number, tokens in enumerate(answers):
        assert decode(tokens).strip() == answer(new_engine(checkpoint), number, max_tokens=6).text.strip()


def test_freezing_a_layer_costs_the_divergence_of_that_route(plain):
    checkpoint = load(plain)
    prompts, own = [prompt_of(checkpoint)], [[40, 41, 42]]
    dense, _ = observe(checkpoint.model, prompts, own)
    costs = freezing_costs(checkpoint.model, prompts, own, dense, [1])
    assert costs.isnan().tolist() == [[True, False, True]]
    route = Route(VISUAL, tuple(range(VISUAL)), (True,) * 3, frozen_layers=frozenset({1}))
    (frozen,) = log_probabilities(checkpoint.model, prompts, own, [route])
    wanted = (dense[0].exp() * (dense[0] - frozen)).sum()
    torch.testing.assert_close(costs[0, 1], wanted, rtol=1e-3, atol=1e-4)
    assert wanted > 0


def test_a_margin_is_by_how_much_the_next_token_is_behind(plain):
    checkpoint = load(plain)
    prompts, full = [prompt_of(checkpoint)], [Route.full(VISUAL, LAYERS)]
    own = generate(checkpoint.model, prompts, checkpoint.eos, 3)
    (tokens,) = log_probabilities(checkpoint.model, prompts, own, full)
    first, second = tokens.topk(2).values.T
    assert margins(checkpoint.model, prompts, own, full) == pytest.approx([float((first - second).min())])
    another = [[*own[0][:-1], int(tokens[-1].argmin())]]
    assert margins(checkpoint.model, prompts, another, full)[0] < 0
