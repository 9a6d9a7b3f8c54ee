"""What the merge corrector learns: to add to the tokens that stay what lets the model answer as it does with the whole picture.

The frozen model's own answers are the teacher (as in PAR: divergence from the un-pruned output on the answer's tokens), but its
gradient is followed instead of comparing sampled token sets. It runs through transformers' model, which can be differentiated and
computes what ours does (`tests/models` hold them together).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pruning.dynamic.levels import layers_to_freeze
from pruning.dynamic.router import Router, select_tokens
from pruning.dynamic.training.dataset import MIN_REST, RouterDataset
from pruning.dynamic.training.loop import score

LEAST_KEPT, MOST_KEPT = 1 / 18, 1 / 4
"""Shares of the visual tokens between which budgets are drawn while learning (evenly in their logarithm). Where more tokens stay,
half of the correction or none is added."""
MOST_FROZEN = 3 / 8
"""Share of the layers in which visual rows are frozen at most."""
PART = 8
"""Questions that run together."""
CAP = 20.0
"""Divergence above this counts as this: one answer that is lost must not outweigh all others."""


def budget(seed: int, tokens: int, layers: int) -> tuple[int, int]:
    """Tokens to keep and layers to freeze, drawn for a part of a step; every other one freezes none."""
    random = torch.Generator().manual_seed(seed)
    share = LEAST_KEPT * (MOST_KEPT / LEAST_KEPT) ** float(torch.rand((), generator=random))
    frozen = int(torch.randint(int(layers * MOST_FROZEN) + 1, (), generator=random)) if seed % 2 else 0
    return max(1, round(share * tokens)), frozen


def distillation_loss(router: Router, model: PreTrainedModel, data: RouterDataset, seed: int) -> Tensor:
    """Mean divergence over the questions: those with answers of like length together, each such part at a budget of its own."""
    tokens, total = data.attention.shape[1], torch.zeros((), device=router.layer_tokens.device)
    by_length = (data.answer >= 0).sum(1).argsort(stable=True)
    for number, part in enumerate(torch.split(by_length, PART)):
        keep, frozen = budget(seed * 64 + number, tokens, router.config.model_layers)
        total = total + divergence(router, model, data.of(part), keep, frozen).sum()
    return total / len(by_length)


def divergence(router: Router, model: PreTrainedModel, data: RouterDataset, keep: int, frozen: int) -> Tensor:
    """KL(un-pruned || routed), summed over the answer's tokens: float32 [questions]. Differentiable in the correction."""
    with torch.no_grad():
        batch = score(router, model.get_input_embeddings(), data)
        kept, shares = select_tokens(batch.output, batch.visual, keep)
        running = [True] * router.config.model_layers
        frozen_layers = [layers_to_freeze(running, frozen, scores) for scores in batch.output.layer_scores.tolist()]
    values = router.corrector(batch.output, batch.visual, kept, shares)
    logits, question = _logits(model, data, values, kept, shares.sum(1).log(), frozen_layers)
    answer = data.answer.to(logits.device)
    there = answer >= 0
    top, wanted = (part[there.cpu()].to(logits.device) for part in (data.top_tokens, data.log_probabilities))
    own = logits.log_softmax(-1).gather(-1, top.long())
    rest = torch.log1p(-own.exp().sum(-1, keepdim=True).clamp_max(1 - MIN_REST))
    lost = (wanted.exp() * (wanted - torch.cat([own, rest], -1))).sum(-1)
    by_question = torch.zeros(len(answer), device=lost.device).index_add(0, question, lost)
    return by_question.clamp_max(CAP)


def _logits(
    model: PreTrainedModel, data: RouterDataset, values: Tensor, kept: Tensor, log_sizes: Tensor,
    frozen_layers: list[frozenset[int]],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """float32 logits [answer tokens of all questions, vocab] and which question each is of; rows are padded at their ends."""
    device, tokens = values.device, data.attention.shape[1]
    embed = model.get_input_embeddings()
    rows, positions, weights, visual, wanted, owners = [], [], [], [], [], []
    for question in range(len(kept)):
        prompt, answer = (part[question][part[question] >= 0] for part in (data.prompt, data.answer))
        start, keep = int(data.image_start[question]), kept.shape[1]
        text = embed(torch.cat([prompt, answer[:-1]]).to(device))
        rows.append(torch.cat([text[:start], values[question].to(text.dtype), text[start:]]))
        behind = torch.arange(start + tokens, tokens + len(text), device=device)
        positions.append(torch.cat([torch.arange(start, device=device), kept[question] + start, behind]))
        weights.append(torch.cat([values.new_zeros(start), log_sizes[question], values.new_zeros(len(behind))]))
        visual.append(torch.arange(len(text) + keep, device=device).sub(start).div(keep, rounding_mode="floor") == 0)
        end = len(text) + keep
        wanted.append(torch.arange(end - len(answer), end, device=device))
        owners.append(torch.full((len(answer),), question, device=device))
    hidden, position = pad_sequence(rows, batch_first=True), pad_sequence(positions, batch_first=True)
    length = hidden.shape[1]
    ahead = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
    bias = pad_sequence(weights, batch_first=True)[:, None, None].expand(-1, 1, length, -1)
    mask = bias.to(hidden.dtype).masked_fill(ahead, torch.finfo(hidden.dtype).min)
    with _frozen(model, pad_sequence(visual, batch_first=True), frozen_layers):
        out = model.model.language_model(inputs_embeds=hidden, attention_mask=mask, position_ids=position, use_cache=False)
    owner = torch.cat(owners)
    return model.lm_head(out.last_hidden_state[owner, torch.cat(wanted)]).float(), owner


@contextmanager
def _frozen(model: PreTrainedModel, visual: Tensor, frozen_layers: list[frozenset[int]]) -> Iterator[None]:
    """While it lasts, the `visual` rows [batch, n] of each question leave its frozen layers as they came."""

    def freeze(layer: int) -> torch.utils.hooks.RemovableHandle:
        here = visual & torch.tensor([layer in layers for layers in frozen_layers], device=visual.device)[:, None]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.where(here[..., None], inputs[0], output)

        handle: torch.utils.hooks.RemovableHandle = model.model.language_model.layers[layer].register_forward_hook(hook)
        return handle

    handles = [freeze(layer) for layer in sorted(frozenset().union(*frozen_layers))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
