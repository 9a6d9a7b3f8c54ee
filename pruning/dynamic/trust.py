"""Level `auto`: how likely is it, from what was read, that a level keeps this answer, and how likely must it be for the level to be
taken, so that a given share of all answers is kept.
"""

from __future__ import annotations

from math import floor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoint import Checkpoint
from pruning.dynamic.fit import read
from pruning.dynamic.lesson import Lesson
from pruning.dynamic.levels import PRUNED
from pruning.dynamic.router import Router
from pruning.dynamic.watch import Watched

FOLDS = 5


def trust(
    router: Router, source: Checkpoint, watched: Watched, held: Tensor, kept: Tensor, lesson: Lesson
) -> tuple[float, dict[str, Any]]:
    """Fit `router.trust` to which answers each level `kept` [held, levels], and find the threshold of `auto`.

    The threshold is found on what folds of pictures say that were left out of the fit, so that it does not believe itself.
    """
    with torch.no_grad():
        reads = [read(router, source.model.embed, watched.of(part)).read for part in torch.split(held, 64)]
        features = torch.cat([router.impression(one) for one in reads])
    labels = kept.float().to(features.device)
    fold = (watched.picture[held] % FOLDS).to(features.device)
    chances = torch.zeros_like(labels)
    for left_out in range(FOLDS):
        weight, bias = logistic(features[fold != left_out], labels[fold != left_out])
        chances[fold == left_out] = (features[fold == left_out] @ weight.T + bias).sigmoid()
    weight, bias = logistic(features, labels)
    router.trust.weight.copy_(weight)
    router.trust.bias.copy_(bias)
    threshold = least_trust(chances, kept.to(chances.device), lesson.target)
    taken = cheapest(chances, threshold)
    stayed = torch.cat([kept.to(chances.device), torch.ones_like(kept[:, :1], device=chances.device)], 1)
    record = {
        "agreement": round(float(stayed.gather(1, taken[:, None]).float().mean()), 4), "questions": len(held),
        "levels": {name: round(float((taken == place).float().mean()), 4) for place, name in enumerate((*PRUNED, "off"))},
        "discrimination": {name: _auc(chances[:, place], kept[:, place]) for place, name in enumerate(PRUNED)},
    }  # fmt: skip
    return threshold, record


def cheapest(chances: Tensor, threshold: float) -> Tensor:
    """For each row of chances [n, levels], cheapest first, the first level whose chance reaches the threshold; levels for `off`."""
    enough = F.pad((chances >= threshold).int(), (0, 1), value=1)
    return enough.argmax(1)


def least_trust(chances: Tensor, kept: Tensor, target: float) -> float:
    """The lowest threshold at and above which the chosen levels keep `target` of the answers; above 1 where none does."""
    stayed = F.pad(kept, (0, 1), value=True)
    lowest = 1.01
    for threshold in sorted({floor(1000 * value) / 1000 for value in chances.flatten().tolist()}, reverse=True):
        share = stayed.gather(1, cheapest(chances, threshold)[:, None]).float().mean()
        if share < target:
            break
        lowest = threshold
    return lowest


def logistic(features: Tensor, labels: Tensor, decay: float = 3e-3) -> tuple[Tensor, Tensor]:
    """Logistic regression of labels [n, k] on features [n, d], with a penalty on the weights [k, d]; and biases [k]."""
    spread = features.std(0, correction=0).clamp_min(1e-6)
    middle = features.mean(0)
    normal = ((features - middle) / spread).detach()
    weight = torch.zeros(labels.shape[1], features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(labels.shape[1], device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(normal @ weight.T + bias, labels) + decay * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    plain = weight.detach() / spread
    return plain, bias.detach() - plain @ middle


def _auc(chances: Tensor, kept: Tensor) -> float | None:
    """How often a kept answer had the higher chance than one that was not (area under the ROC curve)."""
    good, bad = chances[kept], chances[~kept]
    if not len(good) or not len(bad):
        return None
    return round(float((good[:, None] > bad).float().mean()), 4)

