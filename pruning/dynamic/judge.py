"""Each level's budget, found on pictures that the router never learned from: of the ways to spend its share of the arithmetic on
tokens and layers, the one that keeps most answers. And with those, what level `auto` needs to know (`trust`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from models.checkpoint import Checkpoint
from models.flops import flops_ratio
from models.llava import Llava
from models.route import Route
from pruning.dynamic.gaze import WORDS, Asked, said
from pruning.dynamic.lesson import Lesson
from pruning.dynamic.levels import PRUNED, Level, layers_passed, layers_to_run, make_route
from pruning.dynamic.router import Router, read_request
from pruning.dynamic.trust import trust
from pruning.dynamic.watch import Watched

BUDGETS = {"light": 0.6, "balanced": 0.4, "strong": 0.25}
"""Shares of the dense prefill's FLOPs, the router's own among them, by level."""
PASSED = (0.0, 1 / 8, 1 / 4, 3 / 8)
"""Shares of the layers that visual rows may pass by."""
SKIPPED = (0.0, 1 / 16)
"""Shares of the layers that may be left out whole, where `espalier calibrate` has measured them."""
PICTURES = 40
"""Held-out pictures on which the ways to spend a budget are compared; gains differ by less and are compared on all."""
GAINS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of what the router writes: shares of it that may be believed."""


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
    for picture in torch.unique(watched.picture[questions]):
        here = (watched.picture[questions] == picture).nonzero()[:, 0]
        asked, made, routes = [], [], []
        for question in questions[here].tolist():
            one, words_read, answer = as_asked(watched, question, source.model.config.image_token_id)
            one = replace(one, visual=one.visual.to(source.model.device))
            reading = read_request(router, source.model, [one.image], words_read)
            route, visual = make_route(level, [one.image], source.model.layers, source.manifest.layer_change, "router", 0, reading)
            assert visual is not None
            asked.append(replace(one, visual=visual))
            made.append(answer)
            routes.append(route)
        for place, tokens, answer in zip(here.tolist(), said(source.model, asked, made, routes), made, strict=True):
            found[place] = tokens.argmax(-1).tolist() == answer
        advance(len(here))
    return found


def as_asked(watched: Watched, question: int, image: int) -> tuple[Asked, list[int], list[int]]:
    """A question with its picture, what the router reads of it, and the answer."""
    text, words, answer = (
        [token for token in part[question].tolist() if token >= 0] for part in (watched.text, watched.words, watched.answer)
    )
    head = int(watched.head[question])
    prompt = [*text[:head], *[image] * watched.gaze.shape[1], *text[head:]]
    return Asked(prompt, watched.visual[watched.picture[question]]), words, answer


def judge(lesson: Lesson, source: Checkpoint, router: Router, watched: Watched, progress: Progress) -> dict[str, Any]:
    """Choose the writer's gains, each level's budget and what `auto` needs: those of `router.write` and `router.trust` are set.
    Returns the record for the manifest."""
    held = (watched.picture >= lesson.taught).nonzero()[:, 0]
    few = held[watched.picture[held] < lesson.taught + PICTURES]
    text = int((watched.text >= 0).sum(1).median())
    candidates = {name: _candidates(name, source, router, text) for name in PRUNED}
    total = len(PRUNED) * (len(GAINS) + 1) * len(held) + sum(map(len, candidates.values())) * len(few)
    task = progress.add_task("judging", total=total)

    def advance(questions: int) -> None:
        progress.advance(task, questions)

    def share(level: Level, questions: Tensor) -> float:
        return round(float(agreement(level, source, router, watched, questions, advance).float().mean()), 4)

    gains: dict[str, dict[str, float]] = {name: {} for name in PRUNED}
    for gain in GAINS:
        router.write.gains.fill_(gain)
        for name, levels in candidates.items():
            gains[name][str(gain)] = share(levels[0], held)
    router.write.gains.copy_(torch.tensor([float(max(gains[name], key=gains[name].__getitem__)) for name in PRUNED]))
    router.write.shares.copy_(torch.tensor([candidates[name][0].visual_ratio for name in PRUNED]))
    chosen: dict[str, Level] = {}
    measured: dict[str, list[dict[str, float]]] = {}
    for name, levels in candidates.items():
        shares = [share(level, few) for level in levels]
        chosen[name] = levels[max(range(len(levels)), key=lambda i: (shares[i], levels[i].visual_ratio))]
        measured[name] = [{**_budget(level), "agreement": one} for level, one in zip(levels, shares, strict=True)]
    kept = torch.stack([agreement(chosen[name], source, router, watched, held, advance) for name in PRUNED], 1)
    threshold, record = trust(router, source, watched, held, kept, lesson)
    return {
        "levels": {name: _budget(level) for name, level in chosen.items()}, "compared": measured,
        "gains": gains,
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
