"""A model's own answers to questions about pictures, with nothing left out, and how likely it finds given ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.forward import SequenceInput, decode_input, forward, prefill_input
from models.llava import Llava
from models.route import Route
from models.vision.features import ImageFeatures


@dataclass(frozen=True)
class Prompt:
    """Token ids with image tokens expanded, and the visual tokens [visual tokens, width] in their places."""

    ids: list[int]
    visual: Tensor

    @property
    def image(self) -> ImageFeatures:
        """The picture alone, without the class token's attention."""
        return ImageFeatures(self.visual[None])


@torch.inference_mode()
def generate(model: Llava, batch: Sequence[Prompt], eos: Collection[int], max_new_tokens: int) -> list[list[int]]:
    """The un-pruned model's greedy answers; the end token is among them, and the image's, which is no text, never is."""
    inputs = [_input(model, one, (), Route.full(len(one.visual), model.num_layers), reserve=max_new_tokens) for one in batch]
    answers: list[list[int]] = [[] for _ in batch]
    live = list(range(len(batch)))
    while live:
        logits = forward(model, [inputs[i] for i in live])
        logits[:, model.config.image_token_id] = -torch.inf
        tokens = logits.argmax(-1).tolist()
        for i, token in zip(live, tokens, strict=True):
            answers[i].append(token)
            position = len(batch[i].ids) + len(answers[i]) - 1
            ids = torch.tensor([token], device=model.device)
            inputs[i] = decode_input(model, ids, position, inputs[i].route, inputs[i].cache)
        live = [i for i in live if answers[i][-1] not in eos and len(answers[i]) < max_new_tokens]
    return answers


@torch.inference_mode()
def log_probabilities(
    model: Llava, batch: Sequence[Prompt], answers: Sequence[Sequence[int]], routes: Sequence[Route]
) -> list[Tensor]:
    """Of each answer's tokens on a route: float32 [answer tokens, vocab] by question, in one teacher-forced pass."""
    return by_question(forward(model, teacher_forced(model, batch, answers, routes)), answers)


def teacher_forced(
    model: Llava, batch: Sequence[Prompt], answers: Sequence[Sequence[int]], routes: Sequence[Route]
) -> list[SequenceInput]:
    """The prompts with their answers but for the last token, which nothing follows."""
    return [
        _input(model, prompt, answer[:-1], route, logits_to_keep=len(answer))
        for prompt, answer, route in zip(batch, answers, routes, strict=True)
    ]


def by_question(logits: Tensor, answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """Log-probabilities [answer tokens, vocab] of each answer, from the logits of all."""
    return list(torch.split(logits.log_softmax(-1), [len(answer) for answer in answers]))


def _input(
    model: Llava, prompt: Prompt, answer: Sequence[int], route: Route, reserve: int = 0, logits_to_keep: int = 1
) -> SequenceInput:
    ids = torch.tensor([*prompt.ids, *answer], device=model.device)
    return prefill_input(model, ids, prompt.visual, route, model.new_cache(route.rows(len(ids), reserve)), logits_to_keep)
