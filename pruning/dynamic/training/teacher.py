"""What the un-pruned model does with a question: what it says, where it looks, and which layers its visual rows need.

What the router learns to foresee. The signals are the model's own, and no label is read.
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
class Asked:
    """A prompt with image tokens expanded, and its visual tokens [visual tokens, width]."""

    prompt: list[int]
    visual: Tensor

    @property
    def image(self) -> ImageFeatures:
        """The picture alone, without what the vision tower looked at."""
        return ImageFeatures(self.visual[None], self.visual.new_empty(1, 0))


def answers(model: Llava, batch: Sequence[Asked], eos: Collection[int], most: int) -> list[list[int]]:
    """What the un-pruned model says, greedily, in at most `most` tokens; the end token is among them."""
    works = [_work(model, asked, (), Route.full(len(asked.visual), model.num_layers), room=most) for asked in batch]
    made: list[list[int]] = [[] for _ in batch]
    live = list(range(len(batch)))
    while live:
        tokens = forward(model, [works[i] for i in live]).argmax(-1).tolist()
        for i, token in zip(live, tokens, strict=True):
            made[i].append(token)
            place = len(batch[i].prompt) + len(made[i]) - 1
            works[i] = decode_input(model, torch.tensor([token], device=model.device), place, works[i].route, works[i].cache)
        live = [i for i in live if made[i][-1] not in eos and len(made[i]) < most]
    return made


@torch.inference_mode()
def said(model: Llava, batch: Sequence[Asked], answers: Sequence[Sequence[int]], routes: Sequence[Route]) -> list[Tensor]:
    """Log-probabilities of each answer's tokens on a route: float32 [answer tokens, vocab] by question, one pass."""
    return _by_question(forward(model, _teach(model, batch, answers, routes)), answers)


def margins(model: Llava, batch: Sequence[Asked], answers: Sequence[Sequence[int]], routes: Sequence[Route]) -> list[float]:
    """By how much, in logarithms, the likeliest other token is behind each answer's least certain one on a route; one pass.

    Above 0 where the answer is what the model says, token by token.
    """
    found = []
    for tokens, answer in zip(said(model, batch, answers, routes), answers, strict=True):
        given = torch.tensor(answer, device=tokens.device)[:, None]
        own, others = tokens.gather(1, given), tokens.scatter(1, given, -torch.inf)
        found.append(float((own[:, 0] - others.amax(1)).min()))
    return found


def gives(model: Llava, batch: Sequence[Asked], answers: Sequence[Sequence[int]], routes: Sequence[Route]) -> list[bool]:
    """Whether each answer is what the model says on the route, token by token; one pass."""
    return [margin > 0 for margin in margins(model, batch, answers, routes)]


def _teach(model: Llava, batch: Sequence[Asked], answers: Sequence[Sequence[int]], routes: Sequence[Route]) -> list[SequenceInput]:
    """The prompts with their answers but for the last token, which nothing follows."""
    return [
        _work(model, asked, answer[:-1], route, logits_to_keep=len(answer))
        for asked, answer, route in zip(batch, answers, routes, strict=True)
    ]


def _by_question(logits: Tensor, answers: Sequence[Sequence[int]]) -> list[Tensor]:
    return list(torch.split(logits.log_softmax(-1), [len(answer) for answer in answers]))


@torch.inference_mode()
def observe(model: Llava, batch: Sequence[Asked], answers: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """What the un-pruned model says of its answers and where it looks, one pass: by question, log-probabilities as in `said` and
    the most attention that any text row behind the picture pays to each visual token, over heads and layers.

    The latter is float32 [visual tokens]. The most and not the mean: a token that one head needs once is needed (docs/log.md).
    """
    works = _teach(model, batch, answers, [Route.full(len(asked.visual), model.num_layers) for asked in batch])
    inputs: list[Tensor] = []
    logits = forward(model, works, layer_hook=lambda layer, hidden: inputs.append(hidden))
    gazes, start = [], 0
    for asked, answer, work in zip(batch, answers, works, strict=True):
        stop = start + len(asked.prompt) + len(answer) - 1
        is_visual = torch.tensor([*asked.prompt, *answer[:-1]], device=model.device) == model.config.image_token_id
        gazes.append(_gaze(model, [hidden[start:stop] for hidden in inputs], is_visual, work.cache))
        start = stop
    return _by_question(logits, answers), gazes


def _gaze(model: Llava, inputs: Sequence[Tensor], is_visual: Tensor, cache: RequestCache) -> Tensor:
    """From the rows that enter each layer, [rows, width], and the keys that it made of them."""
    places, text = is_visual.nonzero()[:, 0], (~is_visual).nonzero()[:, 0]
    text = text[text > places[0]]
    ahead = torch.arange(len(is_visual), device=model.device) > text[:, None]
    cos, sin = model.rope(text)
    most = torch.zeros(len(places), device=model.device)
    for layer, (block, hidden) in enumerate(zip(model.decoder_layers, inputs, strict=True)):
        qkv = block.qkv(rms_norm(hidden[text], block.input_norm, model.eps))
        query = qkv.view(len(text), -1, model.head_dim)[:, : block.heads]
        query = apply_rope(query, cos, sin).view(len(text), block.kv_heads, -1, model.head_dim)
        scores = torch.einsum("rkgd,knd->kgrn", query, cache.keys(layer)).float() * model.head_dim**-0.5
        most = torch.maximum(most, scores.masked_fill(ahead, -torch.inf).softmax(-1)[..., places].amax((0, 1, 2)))
    return most


def passing_costs(model: Llava, batch: Sequence[Asked], answers: Sequence[Sequence[int]], dense: Sequence[Tensor]) -> Tensor:
    """KL(un-pruned || visual rows pass one layer by), summed over the answer: float32 [questions, layers].

    `dense` are the un-pruned log-probabilities. NaN for the first and the last layer, which none passes by.
    """
    costs = torch.full((len(batch), model.num_layers), torch.nan)
    for layer in range(1, model.num_layers - 1):
        routes = [replace(Route.full(len(one.visual), model.num_layers), frozen_layers=frozenset({layer})) for one in batch]
        for question, (found, wanted) in enumerate(zip(said(model, batch, answers, routes), dense, strict=True)):
            costs[question, layer] = F.kl_div(found, wanted, reduction="sum", log_target=True)
    return costs


def _work(
    model: Llava, asked: Asked, answer: Sequence[int], route: Route, room: int = 0, logits_to_keep: int = 1
) -> SequenceInput:
    ids = torch.tensor([*asked.prompt, *answer], device=model.device)
    rows = [n + room for n in route.rows(len(ids))]
    cache = model.new_cache(rows)
    return prefill_input(model, ids, asked.visual, route, cache, logits_to_keep)
