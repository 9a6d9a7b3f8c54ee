"""What the un-pruned model does with a question: its answer, its attention, and in which layers it needs its visual rows.

This is what the router learns to predict. The signals are the model's own, and no label is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.forward import forward
from models.kv_cache import RequestCache
from models.llava import Llava
from models.ops import apply_rope, rms_norm
from models.route import Route
from pruning.answers import Prompt, by_question, log_probabilities, teacher_forced


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
    inputs = teacher_forced(model, batch, answers, [Route.full(len(one.visual), model.num_layers) for one in batch])
    entering: list[Tensor] = []
    logits = forward(model, inputs, layer_hook=lambda layer, hidden: entering.append(hidden))
    attention, start = [], 0
    for one, answer, given in zip(batch, answers, inputs, strict=True):
        stop = start + len(one.ids) + len(answer) - 1
        is_visual = torch.tensor([*one.ids, *answer[:-1]], device=model.device) == model.config.image_token_id
        attention.append(_attention(model, [hidden[start:stop] for hidden in entering], is_visual, given.cache))
        start = stop
    return by_question(logits, answers), attention


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


def freezing_costs(
    model: Llava, batch: Sequence[Prompt], answers: Sequence[Sequence[int]], dense: Sequence[Tensor], layers: Iterable[int]
) -> Tensor:
    """KL(un-pruned || visual rows frozen in one layer), summed over the answer: float32 [questions, layers], one pass for each of
    `layers`, NaN for the others. `dense` are the un-pruned log-probabilities.
    """
    costs = torch.full((len(batch), model.num_layers), torch.nan)
    for layer in layers:
        routes = [replace(Route.full(len(one.visual), model.num_layers), frozen_layers=frozenset({layer})) for one in batch]
        frozen = log_probabilities(model, batch, answers, routes)
        for question, (found, wanted) in enumerate(zip(frozen, dense, strict=True)):
            costs[question, layer] = F.kl_div(found, wanted, reduction="sum", log_target=True)
    return costs
