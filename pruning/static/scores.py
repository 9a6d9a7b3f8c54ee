"""What a matrix is worth to the loss (ECoFLaP's zeroth and first order scores), and how many outliers it holds (OWL's)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from pruning.static.data import Sample

EPSILON = 1e-3
"""ECoFLaP's step along the random direction."""
OUTLIER = 5.0
"""OWL's threshold: an outlier is this many times the mean of its matrix."""


def answer_loss(model: LlavaForConditionalGeneration, sample: Sample) -> Tensor:
    """Cross entropy of the answers' tokens given picture and question."""
    logits = model(**sample.inputs(model), logits_to_keep=sample.before_answers.to(model.device), use_cache=False).logits[0]
    return F.cross_entropy(logits.float(), sample.ids[sample.answers].to(logits.device))


def zeroth_order(
    model: LlavaForConditionalGeneration, linears: dict[str, nn.Linear], samples: Sequence[Sample], seed: int
) -> Iterator[tuple[str, float]]:
    """(matrix, score), one matrix after the other: the sum over samples of |L(W + εz) - L(W - εz)| / 2ε for a normal z.

    Two forward passes a matrix and sample, no gradients held. Each matrix is put back from a copy: adding the step again would
    leave rounding behind. A matrix's noise depends on seed and name alone, so that a run that goes on scores as one that never
    stopped.
    """
    for name, linear in linears.items():
        yield name, _zeroth_order(model, linear.weight, samples, torch.Generator().manual_seed(crc32(f"{seed}/{name}".encode())))


@torch.no_grad()
def _zeroth_order(
    model: LlavaForConditionalGeneration, weight: Tensor, samples: Sequence[Sample], generator: torch.Generator
) -> float:
    before = weight.clone()
    score = 0.0
    for sample in samples:
        noise = EPSILON * torch.randn(weight.shape, generator=generator).to(weight)
        losses = []
        for direction in (1, -1):
            weight.copy_(before).add_(noise, alpha=direction)
            losses.append(float(answer_loss(model, sample)))
        score += abs(losses[0] - losses[1]) / (2 * EPSILON)
    weight.copy_(before)
    return score


def first_order(
    model: LlavaForConditionalGeneration, linears: dict[str, nn.Linear], samples: Sequence[Sample],
    progress: Callable[[], None],
) -> dict[str, float]:  # fmt: skip
    """The sum over samples of each matrix's gradient norm, which the zeroth order estimates: one backward pass a sample."""
    model.requires_grad_(False)
    weights = {name: linear.weight.requires_grad_(True) for name, linear in linears.items()}
    scores = dict.fromkeys(weights, 0.0)
    for sample in samples:
        gradients = torch.autograd.grad(answer_loss(model, sample), list(weights.values()))
        for name, gradient in zip(weights, gradients, strict=True):
            scores[name] += float(gradient.float().norm())
        progress()
    model.requires_grad_(False)
    return scores


def outliers(weight: Tensor, squares: Tensor) -> float:
    """OWL's layer-wise outlier distribution: the share of weights whose Wanda score is over OUTLIER times the mean."""
    scores = weight.float().abs() * squares.sqrt()
    return float((scores > OUTLIER * scores.mean()).float().mean())
