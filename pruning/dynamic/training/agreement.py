"""How likely it is that an answer stays at an operating point; and what follows: the cost weight at which a level spends its
budget, and those at which level `auto` keeps a given share of all answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Binomial

from pruning.dynamic.levels import AUTO, OperatingPoint, choose, costs_of
from pruning.dynamic.router import AgreementHead
from pruning.dynamic.router_file import LevelRecord, Measured

BUDGETS = {"light": 0.6, "balanced": 0.4, "strong": 0.25}
"""Shares of the dense prefill's FLOPs that levels spend on average, the router's own included."""
COST_WEIGHTS = np.geomspace(1e-4, 100, 61).tolist()
"""In answers: at 0.1 a tenth of a dense prefill is worth a hundredth of an answer."""
FINE = [0.0, *np.geomspace(COST_WEIGHTS[0], COST_WEIGHTS[-1], 601).tolist()]
"""Those that `auto` is found among; at none the whole model runs."""
CHANCE = 0.05
"""Probability that a share that lies above its target does so by chance; more is too much."""
FOLDS = 5
SHARPNESS = 2.0
"""An answer whose least certain token is ahead by a margin counts as kept by the sigmoid of so many times the margin: one that
hangs in the balance says less than one that is clear (docs/log.md)."""
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 400, 256, 1e-3, 1e-2, 0.3
"""How the agreement head learns; of fewer than 3,000 questions for fewer steps."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out questions: expected agreement, float32, and whether the answer stayed, bool; [questions, points], the whole model
    last."""

    expected: Tensor
    stayed: Tensor
    points: Sequence[OperatingPoint]

    def of(self, questions: Tensor) -> HeldOut:
        return replace(self, expected=self.expected[questions], stayed=self.stayed[questions])

    def only(self, points: Sequence[int]) -> HeldOut:
        """With those operating points alone to choose from."""
        return HeldOut(self.expected[:, points], self.stayed[:, points], [self.points[i] for i in points])

    def take(self, cost_weight: float) -> tuple[Tensor, Tensor]:
        """Which point each question takes at a cost weight, and whether its answer stays there, bool."""
        taken = choose(self.expected, costs_of(self.points), cost_weight)
        return taken, self.stayed.gather(1, taken[:, None])[:, 0]

    def measure(self, cost_weight: float) -> Measured:
        """What the questions take at a cost weight, on average."""
        costs, (taken, stayed) = costs_of(self.points), self.take(cost_weight)
        kept = torch.tensor([point.visual_ratio for point in self.points])
        flops, tokens, agreement = (round(float(values.mean()), 4) for values in (costs[taken], kept[taken], stayed.float()))
        return Measured(
            cost_weight=cost_weight, flops_ratio=flops, visual_ratio=tokens, agreement=agreement, questions=len(taken)
        )  # fmt: skip


def fit_and_validate(features: Tensor, margins: Tensor, picture: Tensor, width: int) -> tuple[AgreementHead, Tensor]:
    """Fit a head to which answers stay, from features [n, d] and `margins`, float32 [n, points] (see `teacher.margins`); the whole
    model is not among the points.

    Returns it, and the expected agreement, float32 [n, points], of folds of pictures that were left out of the fit, so that what is
    found with it does not believe itself.
    """
    labels, fold = (SHARPNESS * margins).sigmoid(), picture % FOLDS
    expected = torch.zeros_like(labels)
    for left_out in range(FOLDS):
        head = fit(features[fold != left_out], labels[fold != left_out], width)
        expected[fold == left_out] = head(features[fold == left_out]).sigmoid()
    return fit(features, labels, width), expected


def fit(features: Tensor, labels: Tensor, width: int) -> AgreementHead:
    """A head that predicts labels [n, points], probabilities, from features [n, d].

    Seeded, and torch's own generator is left as it was.
    """
    spread, middle = features.std(0, correction=0).clamp_min(1e-6), features.mean(0)
    normal = (features - middle) / spread
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = AgreementHead(features.shape[1], width, labels.shape[1])
        optimizer = torch.optim.AdamW(head.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        for _ in range(min(STEPS, 50 + len(normal) // 8)):
            drawn = torch.randint(len(normal), (BATCH,))
            loss = F.binary_cross_entropy_with_logits(head(normal[drawn], DROPOUT), labels[drawn])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    head.requires_grad_(False)
    head.hidden.weight.div_(spread)
    head.hidden.bias.sub_(head.hidden.weight @ middle)
    return head


def find_levels(held_out: HeldOut, follow_up: Tensor, target: float) -> dict[str, LevelRecord]:
    """The levels with a budget, each at the lowest cost weight that stays within it on questions that open a chat; and `auto`.

    `auto` has two, for those and for questions that follow an answer (bool [questions]), which are harder: at one for both they
    would be answered worse. Where no question follows another, nothing is told of those that do.
    """
    first = held_out.of(~follow_up)
    second = held_out.of(follow_up) if follow_up.any() else None
    levels = {}
    for name, budget in BUDGETS.items():
        weight = within_budget(first, budget)
        levels[name] = LevelRecord(first=first.measure(weight), follow_up=second.measure(weight) if second else None)
    auto = LevelRecord(first=keeping(first, target), follow_up=keeping(second, target) if second else None)
    return levels | {AUTO: auto}


def within_budget(held_out: HeldOut, budget: float) -> float:
    """The lowest cost weight at which the questions spend no more than `budget` on average."""
    low, high = COST_WEIGHTS[0], COST_WEIGHTS[-1]
    for _ in range(30):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if held_out.measure(middle).flops_ratio <= budget else (middle, high)
    return float(high)


def keeping(held_out: HeldOut, target: float) -> Measured:
    """The highest cost weight at which more than `target` of the answers stay, by more than chance: were that the share, so many of
    these would stay once in twenty times (the exact binomial test: of fewer than 299 questions not even all are proof of 99 %).

    Weights are tried upwards until one fails, so that the confidence is that of a single test (Learn then Test's fixed sequence,
    arXiv 2110.01052).
    """
    enough = fewest_above(target, len(held_out.expected))
    taken = FINE[0]
    for weight in FINE[1:]:
        if int(held_out.take(weight)[1].sum()) < enough:
            break
        taken = weight
    return held_out.measure(taken)


def fewest_above(share: float, n: int) -> int:
    """The fewest of `n` that are more than `share` of them by more than chance; n + 1 where no number is."""
    chances = Binomial(n, torch.tensor(share, dtype=torch.float64))
    of_each: Tensor = chances.log_prob(torch.arange(n + 1, dtype=torch.float64)).exp()  # type: ignore[no-untyped-call]
    of_so_many = of_each.flip(0).cumsum(0).flip(0)
    return int((of_so_many > CHANCE).sum())


def sweep(held_out: HeldOut) -> dict[str, list[Measured]]:
    """What many cost weights make of the questions, where layers may be left out and where they may not."""
    tokens_alone = [i for i, point in enumerate(held_out.points) if not point.skipped_layers and not point.frozen_layers]
    choices = {"tokens": held_out.only(tokens_alone), "tokens and layers": held_out}
    return {name: [some.measure(weight) for weight in COST_WEIGHTS] for name, some in choices.items()}


def area_under_roc(expected: Tensor, stayed: Tensor) -> float | None:
    """How often an answer that stayed was given more than one that did not; of one point's, [questions] each."""
    good, bad = expected[stayed], expected[~stayed]
    if not len(good) or not len(bad):
        return None
    return round(float((good[:, None] > bad).float().mean()), 4)
