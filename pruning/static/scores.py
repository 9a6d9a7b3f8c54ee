"""How much a matrix matters to the loss (ECoFLaP's scores of zeroth and first order), and how many outliers it has (OWL)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pruning.static.blocks import BlockInput, blocks, linears, sequential
from pruning.static.packing import PackedSample

EPSILON = 1e-3
"""ECoFLaP's step along the random direction."""
OUTLIER = 5.0
"""OWL's M: an outlier is this many times the mean of its matrix."""


def answer_loss(model: PreTrainedModel, sample: PackedSample) -> Tensor:
    """Cross entropy of the answers' tokens given picture and question."""
    logits = model(**sample.inputs(model), logits_to_keep=sample.before_answers.to(model.device), use_cache=False).logits[0]
    return cross_entropy(logits, sample)


def _answer_loss_from(model: PreTrainedModel, index: int, block_input: BlockInput, sample: PackedSample) -> Tensor:
    """`answer_loss`, going on from the input of block `index`: what comes before a changed matrix need not run again."""
    hidden = block_input.hidden_states
    for block in blocks(model)[index:]:
        hidden = replace(block_input, hidden_states=hidden).run(block)
    rows = hidden[0, sample.before_answers.to(hidden.device)]
    return cross_entropy(model.lm_head(model.model.language_model.norm(rows)), sample)


def cross_entropy(logits: Tensor, sample: PackedSample) -> Tensor:
    """Of the tokens of a sample's answers, whose logits are [answer tokens, vocab]."""
    return F.cross_entropy(logits.float(), sample.ids[sample.answers].to(logits.device))


@torch.no_grad()
def zeroth_order(
    model: PreTrainedModel, samples: Sequence[PackedSample], seed: int, known: Collection[str] = ()
) -> Iterator[tuple[str, float]]:
    """(matrix, score) of each not in `known`: the sum over samples of |L(W + εz) - L(W - εz)| / 2ε for a normal z.

    Two forward passes a matrix and sample, no gradients held. Each matrix is put back from a copy: adding the step again would
    leave rounding behind. A matrix's noise depends on seed and name alone, so that a run that goes on scores as one that never
    stopped.
    """
    for block, inputs in sequential(model, samples):
        losses = [partial(_answer_loss_from, model, block.index, one, s) for one, s in zip(inputs, samples, strict=True)]
        for name, linear in block.linears().items():
            if name not in known:
                generator = torch.Generator().manual_seed(crc32(f"{seed}/{name}".encode()))
                yield name, _zeroth_order(linear.weight, losses, generator)


def _zeroth_order(weight: Tensor, losses: Sequence[Callable[[], Tensor]], generator: torch.Generator) -> float:
    dense = weight.clone()
    score = 0.0
    for loss in losses:
        noise = EPSILON * torch.randn(weight.shape, generator=generator).to(weight)
        plus, minus = (_loss_at(weight, dense, noise, sign, loss) for sign in (1, -1))
        score += abs(plus - minus) / (2 * EPSILON)
    weight.copy_(dense)
    return score


def _loss_at(weight: Tensor, dense: Tensor, noise: Tensor, sign: int, loss: Callable[[], Tensor]) -> float:
    weight.copy_(dense).add_(noise, alpha=sign)
    return float(loss())


def first_order(model: PreTrainedModel, samples: Sequence[PackedSample], progress: Callable[[], None]) -> dict[str, float]:
    """The sum over samples of each matrix's gradient norm, which the zeroth order estimates: one backward pass a sample."""
    model.requires_grad_(False)
    weights = {name: linear.weight.requires_grad_(True) for name, linear in linears(model).items()}
    scores = dict.fromkeys(weights, 0.0)
    for sample in samples:
        gradients = torch.autograd.grad(answer_loss(model, sample), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            scores[name] += float(gradient.float().norm())
        progress()
    model.requires_grad_(False)
    return scores


def outlier_ratio(weight: Tensor, squares: Tensor) -> float:
    """OWL's layer-wise outlier distribution: the share of weights whose Wanda score is over OUTLIER times the mean.

    squares: [in], the mean of each input's square.
    """
    scores = weight.float().abs() * squares.sqrt()
    return float((scores > OUTLIER * scores.mean()).float().mean())
