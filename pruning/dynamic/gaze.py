"""Where a model looks: the attention that the words of a question and of its answer pay to each visual token.

What the router learns to foresee. The signal is the un-pruned model's own, and no label is read.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.forward import Work, forward, prompt_work, rotate, token_work
from models.kv_cache import RequestCache
from models.llava import Llava
from models.route import Route

WORDS = 64
"""Most text tokens that a router reads: the end of the prompt, where the question is."""


@dataclass(frozen=True)
class Asked:
    """A prompt with image tokens expanded, and its visual tokens [visual tokens, width]."""

    prompt: list[int]
    visual: Tensor


def words(prompt: Sequence[int], image_token: int) -> list[int]:
    """What of a prompt the router reads: its last text tokens, but none from before the first picture."""
    start = prompt.index(image_token) if image_token in prompt else 0
    return [token for token in prompt[start:] if token != image_token][-WORDS:]


def answers(model: Llava, batch: Sequence[Asked], eos: Collection[int], most: int) -> list[list[int]]:
    """What the un-pruned model says, greedily, in at most `most` tokens; the end token is among them."""
    works = [_work(model, asked, (), room=most) for asked in batch]
    made: list[list[int]] = [[] for _ in batch]
    live = list(range(len(batch)))
    while live:
        tokens = forward(model, [works[i] for i in live]).argmax(-1).tolist()
        for i, token in zip(live, tokens, strict=True):
            made[i].append(token)
            place = len(batch[i].prompt) + len(made[i]) - 1
            works[i] = token_work(model, torch.tensor([token], device=model.device), place, works[i].route, works[i].cache)
        live = [i for i in live if made[i][-1] not in eos and len(made[i]) < most]
    return made


@torch.inference_mode()
def gaze(model: Llava, asked: Asked, answer: Sequence[int]) -> Tensor:
    """The most attention that any text row behind the picture pays to each visual token, over heads and layers.

    float32 [visual tokens]. The most and not the mean: a token that one head needs once is needed (measured: docs/log.md).
    """
    work = _work(model, asked, answer)
    inputs: list[Tensor] = []
    forward(model, [work], watch=lambda layer, hidden: inputs.append(hidden))
    is_visual = torch.tensor([*asked.prompt, *answer], device=model.device) == model.config.image_token_id
    places = is_visual.nonzero()[:, 0]
    text = (~is_visual).nonzero()[:, 0]
    text = text[text > places[0]]
    ahead = torch.arange(len(is_visual), device=model.device) > text[:, None]
    cos, sin = model.rope(text)
    most = torch.zeros(len(places), device=model.device)
    for layer, (block, hidden) in enumerate(zip(model.blocks, inputs, strict=True)):
        qkv = block.qkv(F.rms_norm(hidden[text], hidden.shape[-1:], block.input_norm, model.eps))
        query = qkv.view(len(text), -1, model.head_dim)[:, : block.heads]
        query = rotate(query, cos, sin).view(len(text), block.kv_heads, -1, model.head_dim)
        scores = torch.einsum("rkgd,knd->kgrn", query, work.cache.keys(layer)).float() * model.head_dim**-0.5
        most = torch.maximum(most, scores.masked_fill(ahead, -torch.inf).softmax(-1)[..., places].amax((0, 1, 2)))
    return most


def _work(model: Llava, asked: Asked, answer: Sequence[int], room: int = 0) -> Work:
    ids = torch.tensor([*asked.prompt, *answer], device=model.device)
    route = Route.full(len(asked.visual), model.layers)
    rows = [n + room for n in route.rows(len(ids))]
    cache = RequestCache(rows, model.kv_heads, model.head_dim, model.dtype, model.device)
    return prompt_work(model, ids, asked.visual, route, cache)
