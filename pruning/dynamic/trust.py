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
from pruning.dynamic.fit import read
from pruning.dynamic.levels import Rung, choose
from pruning.dynamic.router import Router
from pruning.dynamic.watch import Watched

BUDGETS = {"strong": 0.25, "balanced": 0.4, "light": 0.6}
"""Shares of the dense prefill's FLOPs that levels spend on average, the router's own among them."""
PRICES = np.geomspace(1e-4, 100, 61).tolist()
"""Of arithmetic, in answers: at 0.1 a tenth of a dense prefill is worth a hundredth of an answer."""
FOLDS = 5


def trust(
    router: Router, source: Checkpoint, watched: Watched, held: Tensor, kept: Tensor
) -> tuple[Tensor, list[float | None]]:
    """Fit `router.trust` to which answers each rung `kept`, bool [held, rungs]; the whole model is not among those.

    Returns the chances, float32 [held, rungs + 1], of folds of pictures that were left out of the fit, so that what is found with
    them does not believe itself; and how well each rung's tell answers apart that stay (area under the ROC curve).
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
    chances = chances.cpu()
    return F.pad(chances, (0, 1), value=1.0), [_auc(chances[:, rung], kept[:, rung]) for rung in range(kept.shape[1])]


def budgets(
    chances: Tensor, kept: Tensor, rungs: Sequence[Rung]
) -> tuple[dict[str, dict[str, float]], dict[str, list[dict[str, float]]]]:
    """What every price makes of held-out questions, where layers may be left out and where they may not; and the levels, each at
    the lowest price that stays within its budget."""
    trade = {}
    tokens_alone = [i for i, rung in enumerate(rungs) if rung.runs_all_layers]
    for name, allowed in (("tokens", tokens_alone), ("tokens and layers", list(range(len(rungs))))):
        trade[name] = [_at(price, chances[:, allowed], kept[:, allowed], [rungs[i] for i in allowed]) for price in PRICES]
    levels = {}
    for name, budget in BUDGETS.items():
        low, high = PRICES[0], PRICES[-1]
        for _ in range(30):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if _at(middle, chances, kept, rungs)["flops_ratio"] <= budget else (middle, high)
        levels[name] = _at(high, chances, kept, rungs)
    return levels, trade


def _at(price: float, chances: Tensor, kept: Tensor, rungs: Sequence[Rung]) -> dict[str, float]:
    costs, shares = torch.tensor([rung.cost for rung in rungs]), torch.tensor([rung.visual_ratio for rung in rungs])
    taken = choose(chances, costs, price)
    means = {"flops_ratio": costs[taken], "visual_ratio": shares[taken], "agreement": kept.gather(1, taken[:, None]).float()}
    return {"price": price, **{name: round(float(values.mean()), 4) for name, values in means.items()}}


def price_of(trade: Sequence[Mapping[str, float]], what: str, budget: float) -> float:
    """The price at which `what`, flops_ratio, visual_ratio or agreement, is `budget` on average; between those of a trade, in
    proportion."""
    bought = np.minimum.accumulate([entry[what] for entry in trade])  # less and less as the price rises
    return float(np.exp(np.interp(-budget, -bought, [np.log(entry["price"]) for entry in trade])))


def auto(
    chances: Tensor, kept: Tensor, rungs: Sequence[Rung], trade: Sequence[Mapping[str, float]], target: float
) -> dict[str, Any]:
    """The price at which `target` of the answers stay, and what it buys."""
    return {"target": target, "questions": len(kept), **_at(price_of(trade, "agreement", target), chances, kept, rungs)}


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

