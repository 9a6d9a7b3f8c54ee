"""What the un-pruned model does with a question: its answer, its attention, and in which layers it needs its visual rows.

This is what the router learns to predict. The signals are the model's own, and no label is read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.forward import SequenceInput, decode_input, forward, prefill_input
from models.kv_cache import RequestCache
from models.llava import Llava
from models.ops import apply_rope, rms_norm
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


def generate(model: Llava, batch: Sequence[Prompt], eos: Collection[int], max_new_tokens: int) -> list[list[int]]:
    """The un-pruned model's greedy answers; the end token is among them."""
    inputs = [_input(model, one, (), Route.full(len(one.visual), model.num_layers), reserve=max_new_tokens) for one in batch]
    answers: list[list[int]] = [[] for _ in batch]
    live = list(range(len(batch)))
    while live:
        tokens = forward(model, [inputs[i] for i in live]).argmax(-1).tolist()
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
    return _by_question(forward(model, _teacher_forced(model, batch, answers, routes)), answers)


def margins(model: Llava, batch: Sequence[Prompt], answers: Sequence[Sequence[int]], routes: Sequence[Route]) -> list[float]:
    """By how much, in logarithms, the likeliest other token is behind each answer's least certain one on a route; one pass.

    Above 0 where the answer is the model's greedy one, token by token.
    """
    found = []
    for tokens, answer in zip(log_probabilities(model, batch, answers, routes), answers, strict=True):
        given = torch.tensor(answer, device=tokens.device)[:, None]
        own, others = tokens.gather(1, given), tokens.scatter(1, given, -torch.inf)
        found.append(float((own[:, 0] - others.amax(1)).min()))
    return found


@torch.inference_mode()
def observe(model: Llava, batch: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and attention of the un-pruned model, one pass: by question, the former as in `log_probabilities`, and the
    most attention that any text row behind the picture pays to each visual token, over heads and layers.

    The latter is float32 [visual tokens]. The most and not the mean: a token that one head needs once is needed (docs/log.md).
    """
    inputs = _teacher_forced(model, batch, answers, [Route.full(len(one.visual), model.num_layers) for one in batch])
    entering: list[Tensor] = []
    logits = forward(model, inputs, layer_hook=lambda layer, hidden: entering.append(hidden))
    attention, start = [], 0
    for one, answer, given in zip(batch, answers, inputs, strict=True):
        stop = start + len(one.ids) + len(answer) - 1
        is_visual = torch.tensor([*one.ids, *answer[:-1]], device=model.device) == model.config.image_token_id
        attention.append(_attention(model, [hidden[start:stop] for hidden in entering], is_visual, given.cache))
        start = stop
    return _by_question(logits, answers), attention


def _attention(model: Llava, entering: Sequence[Tensor], is_visual: Tensor, cache: RequestCache) -> Tensor:
    """From the rows that enter each layer, [rows, width], and the keys that it made of them."""
    visual, text = is_visual.nonzero()[:, 0], (~is_visual).nonzero()[:, 0]
    text = text[text > visual[0]]
    ahead = torch.arange(len(is_visual), device=model.device) > text[:, None]
    cos, sin = model.rope(text)
    most = torch.zeros(len(visual), device=model.device)
    for layer, (block, hidden) in enumerate(zip(model.decoder_layers, entering, strict=True)):
        qkv = block.qkv(rms_norm(hidden[text], block.input_norm, model.eps))
        query = qkv.view(len(text), -1, model.head_dim)[:, : block.heads]
        query = apply_rope(query, cos, sin).view(len(text), block.kv_heads, -1, model.head_dim)
        scores = torch.einsum("rkgd,knd->kgrn", query, cache.keys(layer)).float() * model.head_dim**-0.5
        most = torch.maximum(most, scores.masked_fill(ahead, -torch.inf).softmax(-1)[..., visual].amax((0, 1, 2)))
    return most


def freezing_costs(model: Llava, batch: Sequence[Prompt], answers: Sequence[Sequence[int]], dense: Sequence[Tensor]) -> Tensor:
    """KL(un-pruned || visual rows frozen in one layer), summed over the answer: float32 [questions, layers].

    `dense` are the un-pruned log-probabilities. NaN for the first and the last layer, where they never are.
    """
    costs = torch.full((len(batch), model.num_layers), torch.nan)
    for layer in range(1, model.num_layers - 1):
        routes = [replace(Route.full(len(one.visual), model.num_layers), frozen_layers=frozenset({layer})) for one in batch]
        frozen = log_probabilities(model, batch, answers, routes)
        for question, (found, wanted) in enumerate(zip(frozen, dense, strict=True)):
            costs[question, layer] = F.kl_div(found, wanted, reduction="sum", log_target=True)
    return costs


def _teacher_forced(
    model: Llava, batch: Sequence[Prompt], answers: Sequence[Sequence[int]], routes: Sequence[Route]
) -> list[SequenceInput]:
    """The prompts with their answers but for the last token, which nothing follows."""
    return [
        _input(model, prompt, answer[:-1], route, logits_to_keep=len(answer))
        for prompt, answer, route in zip(batch, answers, routes, strict=True)
    ]


def _by_question(logits: Tensor, answers: Sequence[Sequence[int]]) -> list[Tensor]:
    return list(torch.split(logits.log_softmax(-1), [len(answer) for answer in answers]))


def _input(
    model: Llava, prompt: Prompt, answer: Sequence[int], route: Route, reserve: int = 0, logits_to_keep: int = 1
) -> SequenceInput:
    ids = torch.tensor([*prompt.ids, *answer], device=model.device)
    return prefill_input(model, ids, prompt.visual, route, model.new_cache(route.rows(len(ids), reserve)), logits_to_keep)
