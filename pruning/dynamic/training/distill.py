"""The second lesson: what to write into the tokens that stay, so that the model says what it says of the whole picture.

The frozen model's own words are the teacher (as in PAR: divergence from the un-pruned output on the answer's tokens), but its
gradient is followed instead of comparing sampled flows. It runs through transformers' model, which differs from ours in nothing
but that it can be differentiated (`tests/models` hold them together).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaForConditionalGeneration

from pruning.dynamic.levels import layers_passed
from pruning.dynamic.router import Router, select
from pruning.dynamic.training.dataset import LEFT_OVER, Watched
from pruning.dynamic.training.loop import read

LEAST_KEPT, MOST_KEPT = 1 / 18, 1 / 4
"""Shares of the visual tokens between which budgets are drawn while learning (evenly in their logarithm). Where more tokens stay,
what is written is believed by half or not at all."""
MOST_PASSED = 3 / 8
"""Share of the layers that visual rows pass by at most."""
PART = 8
"""Questions that run together."""
CAP = 20.0
"""Divergence above this counts as this: one answer that is lost must not outweigh all others."""


def budget(seed: int, tokens: int, layers: int) -> tuple[int, int]:
    """Tokens to keep and layers to pass by, drawn for a part of a step; every other one passes none by."""
    random = torch.Generator().manual_seed(seed)
    share = LEAST_KEPT * (MOST_KEPT / LEAST_KEPT) ** float(torch.rand((), generator=random))
    passed = int(torch.randint(int(layers * MOST_PASSED) + 1, (), generator=random)) if seed % 2 else 0
    return max(1, round(share * tokens)), passed


def writing_error(router: Router, model: LlavaForConditionalGeneration, asked: Watched, seed: int) -> Tensor:
    """Mean divergence over the questions: those with answers of like length together, each such part at a budget of its own."""
    tokens, total = asked.gaze.shape[1], torch.zeros((), device=router.layers.device)
    by_length = (asked.answer >= 0).sum(1).argsort(stable=True)
    for number, part in enumerate(torch.split(by_length, PART)):
        keep, passed = budget(seed * 64 + number, tokens, router.shape.layers)
        total = total + divergence(router, model, asked.of(part), keep, passed).sum()
    return total / len(by_length)


def divergence(router: Router, model: LlavaForConditionalGeneration, asked: Watched, keep: int, passed: int) -> Tensor:
    """KL(un-pruned || routed), summed over the answer's tokens: float32 [questions]. Differentiable in what the router writes."""
    with torch.no_grad():
        batch = read(router, model.get_input_embeddings(), asked)
        kept, shares = select(batch.read, batch.visual, keep)
        running = [True] * router.shape.layers
        stays = [layers_passed(running, passed, costs) for costs in batch.read.costs.tolist()]
    values = router.write(batch.read, batch.visual, kept, shares)
    logits, rows = _say(model, asked, values, kept, shares.sum(1).log(), stays)
    answer = asked.answer.to(logits.device)
    there = answer >= 0
    alternatives, likely = (part[there.cpu()].to(logits.device) for part in (asked.alternatives, asked.likely))
    own = logits.log_softmax(-1).gather(-1, alternatives.long())
    rest = torch.log1p(-own.exp().sum(-1, keepdim=True).clamp_max(1 - LEFT_OVER))
    lost = (likely.exp() * (likely - torch.cat([own, rest], -1))).sum(-1)
    by_question = torch.zeros(len(answer), device=lost.device).index_add(0, rows, lost)
    return by_question.clamp_max(CAP)


def _say(
    model: LlavaForConditionalGeneration, asked: Watched, values: Tensor, kept: Tensor, sizes: Tensor, stays: list[frozenset[int]]
) -> tuple[Tensor, Tensor]:
    """float32 logits [answer tokens of all questions, vocab] and which question each is of; rows are padded at their ends."""
    device, tokens = values.device, asked.gaze.shape[1]
    embed = model.get_input_embeddings()
    rows, positions, weights, visual, wanted, owners = [], [], [], [], [], []
    for question in range(len(kept)):
        text, answer = (part[question][part[question] >= 0] for part in (asked.text, asked.answer))
        head, keep = int(asked.head[question]), kept.shape[1]
        words = embed(torch.cat([text, answer[:-1]]).to(device))
        rows.append(torch.cat([words[:head], values[question].to(words.dtype), words[head:]]))
        behind = torch.arange(head + tokens, tokens + len(words), device=device)
        positions.append(torch.cat([torch.arange(head, device=device), kept[question] + head, behind]))
        weights.append(torch.cat([values.new_zeros(head), sizes[question], values.new_zeros(len(behind))]))
        visual.append(torch.arange(len(words) + keep, device=device).sub(head).div(keep, rounding_mode="floor") == 0)
        end = len(words) + keep
        wanted.append(torch.arange(end - len(answer), end, device=device))
        owners.append(torch.full((len(answer),), question, device=device))
    hidden, place = pad_sequence(rows, batch_first=True), pad_sequence(positions, batch_first=True)
    length = hidden.shape[1]
    ahead = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    bias = pad_sequence(weights, batch_first=True)[:, None, None].expand(-1, 1, length, -1)
    mask = bias.to(hidden.dtype).masked_fill(ahead, torch.finfo(hidden.dtype).min)
    with _passing(model, pad_sequence(visual, batch_first=True), stays):
        out = model.model.language_model(inputs_embeds=hidden, attention_mask=mask, position_ids=place, use_cache=False)
    owner = torch.cat(owners)
    return model.lm_head(out.last_hidden_state[owner, torch.cat(wanted)]).float(), owner


@contextmanager
def _passing(model: LlavaForConditionalGeneration, visual: Tensor, stays: list[frozenset[int]]) -> Iterator[None]:
    """While it lasts, the `visual` rows [batch, n] of each question leave its layers of `stays` as they came."""

    def put_back(layer: int) -> torch.utils.hooks.RemovableHandle:
        here = visual & torch.tensor([layer in passed for passed in stays], device=visual.device)[:, None]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where(here[..., None], inputs[0], output)

        handle: torch.utils.hooks.RemovableHandle = model.model.language_model.layers[layer].register_forward_hook(hook)
        return handle

    handles = [put_back(layer) for layer in sorted(frozenset().union(*stays))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
