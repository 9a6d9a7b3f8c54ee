"""What a trained router can be trusted with, found on pictures that it never learned from.

First each level's budget: of the ways to spend its share of the arithmetic on tokens and layers, the one that keeps most answers.
Then the level `auto`: from what was read, how likely is it that a level keeps this answer, and from which likelihood on shall it
be taken so that a given share of answers is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import floor
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from models.checkpoint import Checkpoint
from models.flops import flops_ratio
from models.llava import Llava
from models.route import Route
from models.vision import ImageFeatures
from pruning.dynamic.fit import read
from pruning.dynamic.gaze import WORDS, Asked, said
from pruning.dynamic.lesson import Lesson
from pruning.dynamic.levels import PRUNED, Level, layers_passed, layers_to_run, make_route
from pruning.dynamic.router import Router, read_request
from pruning.dynamic.watch import Watched

BUDGETS = {"light": 0.6, "balanced": 0.4, "strong": 0.25}
"""Shares of the dense prefill's FLOPs, the router's own among them, by level."""
PASSED = (0.0, 1 / 8, 1 / 4, 3 / 8)
"""Shares of the layers that visual rows may pass by."""
SKIPPED = (0.0, 1 / 16)
"""Shares of the layers that may be left out whole, where `espalier calibrate` has measured them."""
PICTURES = 40
"""Held-out pictures on which the ways to spend a budget are compared."""
FOLDS = 5


def affordable(model: Llava, router: Router, budget: float, text: int, passed: int, skipped: int = 0) -> int:
    """The most visual tokens that a share of the dense FLOPs affords on routes that leave so many layers out; 1 at least.

    `text` is how many text tokens a typical prompt has.
    """
    total = model.visual_tokens_per_image
    prompt, runs = total + text, layers_to_run(model.layers, skipped, range(model.layers))
    stays = layers_passed(runs, passed, range(model.layers))
    for keep in range(total, 1, -1):
        route = Route(total, tuple(range(keep)), runs, visual_stays=stays)
        if flops_ratio(model.config, route, prompt, router.shape.flops(total, min(text, WORDS), keep)) <= budget:
            return keep
    return 1


def agreement(
    level: Level, source: Checkpoint, router: Router, watched: Watched, questions: Tensor, advance: Callable[[int], None]
) -> Tensor:
    """Whether each answer stays what the un-pruned model says, token by token: bool [questions]. A whole picture is one pass."""
    found = torch.zeros(len(questions), dtype=torch.bool)
    change = source.manifest.calibration.layer_change if source.manifest.calibration else None
    for picture in torch.unique(watched.picture[questions]):
        here = (watched.picture[questions] == picture).nonzero()[:, 0]
        asked, made, routes = [], [], []
        for question in questions[here].tolist():
            prompt, words_read, answer = as_asked(watched, question, source.model.config.image_token_id)
            image = ImageFeatures(watched.visual[picture][None].to(source.model.device), torch.empty(1, 0))
            reading = read_request(router, source.model, [image], words_read)
            route, visual = make_route(level, [image], source.model.layers, change, "router", 0, reading)
            assert visual is not None
            asked.append(Asked(prompt, visual))
            made.append(answer)
            routes.append(route)
        for place, tokens, answer in zip(here.tolist(), said(source.model, asked, made, routes), made, strict=True):
            found[place] = tokens.argmax(-1).tolist() == answer
        advance(len(here))
    return found


def as_asked(watched: Watched, question: int, image: int) -> tuple[list[int], list[int], list[int]]:
    """A question's prompt with its picture, what the router reads of it, and the answer."""
    text, words, answer = (
        [token for token in part[question].tolist() if token >= 0] for part in (watched.text, watched.words, watched.answer)
    )
    head = int(watched.head[question])
    return [*text[:head], *[image] * watched.gaze.shape[1], *text[head:]], words, answer


def judge(lesson: Lesson, source: Checkpoint, router: Router, watched: Watched, progress: Progress) -> dict[str, Any]:
    """Choose each level's budget and what `auto` needs; `router.trust` is set. The record for the manifest."""
    held = (watched.picture >= lesson.taught).nonzero()[:, 0]
    few = held[watched.picture[held] < lesson.taught + PICTURES]
    text = int((watched.text >= 0).sum(1).median())
    candidates = {name: _candidates(name, source, router, text) for name in PRUNED}
    task = progress.add_task("judging", total=sum(map(len, candidates.values())) * len(few) + len(PRUNED) * len(held))

    def advance(questions: int) -> None:
        progress.advance(task, questions)

    chosen: dict[str, Level] = {}
    measured: dict[str, list[dict[str, float]]] = {}
    for name, levels in candidates.items():
        shares = [float(agreement(level, source, router, watched, few, advance).float().mean()) for level in levels]
        chosen[name] = levels[max(range(len(levels)), key=lambda i: (shares[i], levels[i].visual_ratio))]
        measured[name] = [{**_budget(level), "agreement": round(share, 4)} for level, share in zip(levels, shares, strict=True)]
    kept = torch.stack([agreement(chosen[name], source, router, watched, held, advance) for name in PRUNED], 1)
    threshold, record = trust(router, source, watched, held, kept, lesson)
    return {
        "levels": {name: _budget(level) for name, level in chosen.items()}, "compared": measured,
        "auto": {"threshold": threshold, "target": lesson.target, **record},
    }  # fmt: skip


def _candidates(name: str, source: Checkpoint, router: Router, text: int) -> list[Level]:
    model, found = source.model, []
    left_out = sorted({int(model.layers * share) for share in (SKIPPED if source.manifest.calibration else (0.0,))})
    for passed, skipped in product(sorted({int(model.layers * share) for share in PASSED}), left_out):
        keep = affordable(model, router, BUDGETS[name], text, passed, skipped)
        found.append(Level(name, "", round(keep / model.visual_tokens_per_image, 4), skipped, passed))
    return found


def _budget(level: Level) -> dict[str, Any]:
    return {"visual_ratio": level.visual_ratio, "skipped_layers": level.skipped_layers, "passed_layers": level.passed_layers}


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

