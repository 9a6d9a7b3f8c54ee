"""How likely is it, from what was read, that an answer stays on a rung; and what follows: the price at which a level spends its
budget, and for level `auto` the price at which a given share of all answers is kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.checkpoint import Checkpoint
from pruning.dynamic.levels import PRUNED, Rung, choose, costs_of, offered
from pruning.dynamic.router import MEMBERS, Router, Trust
from pruning.dynamic.training.dataset import Watched
from pruning.dynamic.training.loop import read

BUDGETS = {"strong": 0.25, "balanced": 0.4, "light": 0.6}
"""Shares of the dense prefill's FLOPs that levels spend on average, the router's own among them."""
PRICES = np.geomspace(1e-4, 100, 61).tolist()
"""Of arithmetic, in answers: at 0.1 a tenth of a dense prefill is worth a hundredth of an answer."""
CLOSE = [0.0, *np.geomspace(PRICES[0], PRICES[-1], 601).tolist()]
"""Those that `auto` is found among; at none the whole model runs."""
CONFIDENCE = 1.645
"""Standard errors that a share must lie above its target to be above it by more than chance (one-sided, 95 %)."""
FOLDS = 5
SHARPNESS = 2.0
"""An answer whose least certain token is ahead by a margin counts as kept by the sigmoid of so many times the margin: one that
hangs in the balance says less than one that is clear (docs/log.md)."""
STEPS, BATCH, RATE, DECAY, DROPPED = 400, 256, 1e-3, 1e-2, 0.3
"""How the networks learn; of fewer than 3,000 questions for fewer steps."""


def trust(router: Router, source: Checkpoint, watched: Watched, held: Tensor, margins: Tensor) -> tuple[Tensor, list[float | None]]:
    """Fit `router.trust` to which answers stay on each rung, by `margins`, float32 [held, rungs] (see `gaze.margins`); the whole
    model is not among those.

    Returns the chances, float32 [held, rungs + 1], of folds of pictures that were left out of the fit, so that what is found with
    them does not believe itself; and how well each rung's tell answers apart that stay (area under the ROC curve).
    """
    with torch.no_grad():
        reads = [read(router, source.model.embed, watched.of(part)).read for part in torch.split(held, 64)]
        features = torch.cat([router.impression(one) for one in reads]).cpu()
    labels, fold = (SHARPNESS * margins).sigmoid(), watched.picture[held] % FOLDS
    chances = torch.zeros_like(labels)
    for left_out in range(FOLDS):
        found = fit(features[fold != left_out], labels[fold != left_out])
        chances[fold == left_out] = found(features[fold == left_out]).sigmoid()
    router.trust.load_state_dict(fit(features, labels).state_dict())
    kept = margins > 0
    return F.pad(chances, (0, 1), value=1.0), [_auc(chances[:, rung], kept[:, rung]) for rung in range(kept.shape[1])]


def budgets(
    chances: Tensor, kept: Tensor, rungs: Sequence[Rung]
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, float]]]]:
    """What every price makes of held-out questions, where layers may be left out and where they may not; and the levels, each at
    the lowest price that stays within its budget."""
    tokens_alone = [i for i, rung in enumerate(rungs) if rung.runs_all_layers]
    alone = _trade(chances[:, tokens_alone], kept[:, tokens_alone], [rungs[i] for i in tokens_alone])
    trade = {"tokens": alone, "tokens and layers": _trade(chances, kept, rungs)}
    levels = {}
    for name, budget in BUDGETS.items():
        low, high = PRICES[0], PRICES[-1]
        for _ in range(30):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if _at(middle, chances, kept, rungs)["flops_ratio"] <= budget else (middle, high)
        levels[name] = _at(high, chances, kept, rungs)
    return levels, trade


def _trade(chances: Tensor, kept: Tensor, rungs: Sequence[Rung]) -> list[dict[str, float]]:
    return [_at(price, chances, kept, rungs) for price in PRICES]


def _at(price: float, chances: Tensor, kept: Tensor, rungs: Sequence[Rung]) -> dict[str, float]:
    return _bought(price, choose(chances, costs_of(rungs), price), kept, rungs)


def _bought(price: float, taken: Tensor, kept: Tensor, rungs: Sequence[Rung]) -> dict[str, float]:
    shares = torch.tensor([rung.visual_ratio for rung in rungs])
    stays = kept.gather(1, taken[:, None]).float()
    means = {"flops_ratio": costs_of(rungs)[taken], "visual_ratio": shares[taken], "agreement": stays}
    return {"price": price, **{name: round(float(values.mean()), 4) for name, values in means.items()}}


def price_of(trade: Sequence[Mapping[str, float]], what: str, budget: float) -> float:
    """The price at which `what`, flops_ratio or visual_ratio, is `budget` on average; between those of a trade, in proportion."""
    bought = np.minimum.accumulate([entry[what] for entry in trade])  # less and less as the price rises
    return float(np.exp(np.interp(-budget, -bought, [np.log(entry["price"]) for entry in trade])))


def auto(
    chances: Tensor, kept: Tensor, later: Tensor, rungs: Sequence[Rung], levels: Mapping[str, Mapping[str, float]], target: float
) -> dict[str, Any]:
    """The highest prices at which more than `target` of the answers stay, and what they buy: of questions that open a chat, and of
    the `later` ones, bool [questions]. At one price for both, those that are harder would be answered worse."""
    prices = [levels[name]["price"] for name in PRUNED]
    kinds = {"first": ~later, "later": later if later.any() else ~later}
    return {"target": target, **{kind: _safe(chances[of], kept[of], rungs, prices, target) for kind, of in kinds.items()}}


def _safe(chances: Tensor, kept: Tensor, rungs: Sequence[Rung], prices: Sequence[float], target: float) -> dict[str, float]:
    """The highest price at which more than `target` of the answers stay, by more than chance: were that the share, so many of these
    would stay once in twenty times.

    Prices are tried upwards until one fails, so that the confidence is that of a single test (Learn then Test's fixed sequence,
    arXiv 2110.01052)."""
    taken = offered(chances, costs_of(rungs), prices)
    expected, costs = chances.gather(1, taken), costs_of(rungs)[taken]
    sure = min(1.0, target + CONFIDENCE * (target * (1 - target) / len(kept)) ** 0.5)
    found: dict[str, float] = {"questions": len(kept)}
    for price in CLOSE:
        best = choose(expected, costs, price)
        bought = _bought(price, taken.gather(1, best[:, None])[:, 0], kept, rungs)
        if bought["agreement"] < sure:
            break
        found |= bought
    return found


def fit(features: Tensor, labels: Tensor) -> Trust:
    """Networks that foresee labels [n, rungs], chances, from features [n, d]: each is drawn questions of its own.

    Seeded, and torch's own generator is left as it was.
    """
    spread, middle = features.std(0, correction=0).clamp_min(1e-6), features.mean(0)
    normal = (features - middle) / spread
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = Trust(features.shape[1], labels.shape[1])
        optimizer = torch.optim.AdamW(found.parameters(), RATE, weight_decay=DECAY)
        for _ in range(min(STEPS, 50 + len(normal) // 8)):
            drawn = torch.randint(len(normal), (MEMBERS, BATCH))
            loss = F.binary_cross_entropy_with_logits(found.members(normal[drawn], DROPPED), labels[drawn])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found.requires_grad_(False)
    found.hidden.div_(spread[:, None])
    found.bias.sub_(middle @ found.hidden[:, None])
    return found


def _auc(chances: Tensor, kept: Tensor) -> float | None:
    """How often a kept answer had the higher chance than one that was not (area under the ROC curve)."""
    good, bad = chances[kept], chances[~kept]
    if not len(good) or not len(bad):
        return None
    return round(float((good[:, None] > bad).float().mean()), 4)

