"""What a router can be trusted with, found on pictures that it never learned from: how much of what it writes, which answers stay
on each rung of the ladder from few tokens and layers to all, and the prices at which levels spend what they are meant to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from models.checkpoint import Checkpoint
from models.flops import flops_ratio
from models.route import Route
from models.run_state import RunState
from pruning.dynamic.levels import Level, Rung, layers_passed, layers_to_run, make_route
from pruning.dynamic.router import GAINED_AT, WORDS, Router, Shape, read_request
from pruning.dynamic.training.agreement import auto, budgets, trust
from pruning.dynamic.training.config import Lesson
from pruning.dynamic.training.dataset import Watched
from pruning.dynamic.training.teacher import Asked, margins

SHARES = (1 / 36, 1 / 18, 1 / 12, 1 / 9, 1 / 6, 2 / 9, 1 / 3, 1 / 2, 1.0)
"""Of the visual tokens, that a rung may keep."""
PASSED = (0.0, 3 / 8)
"""Shares of the layers that visual rows may pass by: three eighths was best where budgets are small, next to none where not."""
SKIPPED = (0.0, 1 / 16)
"""Shares of the layers that may be left out whole, where `espalier calibrate` has measured them."""
GAINS = (0.0, 0.5, 1.0)
"""Shares of what the router writes that may be believed."""
FEW = 4
"""One in so many held-out questions finds the gains: those are three numbers, the chances' weights are thousands."""


def ways(source: Checkpoint) -> list[tuple[float, int, int]]:
    """Every share of the tokens with every number of layers left out whole and passed by."""
    layers = source.model.num_layers
    skipped, passed = (
        sorted({int(layers * share) for share in shares})
        for shares in (SKIPPED if source.manifest.calibration else SKIPPED[:1], PASSED)
    )
    return list(product(SHARES, skipped, passed))


def ladder(source: Checkpoint, shape: Shape, text: int) -> list[Rung]:
    """What a router chooses from, cheapest first and the whole model last; `text` is how many text tokens a typical prompt has."""
    model = source.model
    total = model.visual_tokens_per_image
    found = []
    for share, skipped, passed in ways(source):
        keep = Level("", "", share).kept(total)
        runs = layers_to_run(model.num_layers, skipped, range(model.num_layers))
        route = Route(total, tuple(range(keep)), runs, frozen_layers=layers_passed(runs, passed, range(model.num_layers)))
        cost = flops_ratio(model.config, route, total + text, shape.flops(total, min(text, WORDS), keep))
        found.append(Rung(share, skipped, passed, round(cost, 4)))
    return sorted(found, key=lambda rung: rung.cost)


def clearness(
    levels: Sequence[Level], source: Checkpoint, router: Router, watched: Watched, questions: Tensor,
    advance: Callable[[int], None],
) -> Tensor:  # fmt: skip
    """How clearly each answer stays what the un-pruned model says, see `gaze.margins`: float32 [questions, levels]. All questions
    about a picture are one pass."""
    found = torch.zeros(len(questions), len(levels))
    model, change = source.model, source.manifest.layer_change
    for picture in torch.unique(watched.picture[questions]):
        here = (watched.picture[questions] == picture).nonzero()[:, 0]
        asked, readings, made = [], [], []
        for question in questions[here].tolist():
            one, words_read, answer = as_asked(watched, question, model.config.image_token_id)
            asked.append(replace(one, visual=one.visual.to(model.device)))
            readings.append(read_request(router, model, [asked[-1].image], words_read))
            made.append(answer)
        for place, level in enumerate(levels):
            routes, routed = [], []
            for one, reading in zip(asked, readings, strict=True):
                route, visual = make_route(level, [one.image], model.num_layers, change, "router", 0, reading)
                assert visual is not None
                routes.append(route)
                routed.append(replace(one, visual=visual))
            found[here, place] = torch.tensor(margins(model, routed, made, routes))
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


def judge(
    lesson: Lesson, source: Checkpoint, router: Router, watched: Watched, work: RunState, progress: Progress
) -> dict[str, Any]:
    """Choose the writer's gains, what to expect of each rung, and the levels' prices: `router.write` and `router.trust` are set.
    Returns the record for the manifest."""
    held = (watched.picture >= lesson.taught).nonzero()[:, 0]
    few = held[: -(-len(held) // FEW)]
    rungs = ladder(source, router.shape, int((watched.text >= 0).sum(1).median()))
    task = progress.add_task("judging", total=len(few) * len(GAINS) * len(GAINED_AT) + len(held) * (len(rungs) - 1))

    def measured(name: str, levels: Sequence[Level], questions: Tensor) -> Tensor:
        if (stored := work.read_tensors(name)) is None:
            found = clearness(levels, source, router, watched, questions, lambda done: progress.advance(task, done))
            work.write_tensors(name, {"margins": found}, {})
            return found
        progress.advance(task, len(questions) * len(levels))
        return stored[0]["margins"]

    believed = []
    for gain in GAINS:
        router.write.gains.fill_(gain)
        clear = measured(f"gain-{gain:g}", [Level("", "", share) for share in GAINED_AT], few)
        believed.append((clear > 0).float().mean(0))
    router.write.gains.copy_(torch.tensor(GAINS)[torch.stack(believed).argmax(0)])
    clear = measured("rungs", [Level("", "", 1.0).at(rung) for rung in rungs[:-1]], held)
    chances, discrimination = trust(router, source, watched, held, clear)
    stayed = torch.cat([clear > 0, torch.ones(len(clear), 1, dtype=torch.bool)], 1)
    later = watched.later[held]
    levels, trade = budgets(chances[~later], stayed[~later], rungs)
    shares = stayed.float().mean(0).tolist()
    return {
        "rungs": [asdict(rung) for rung in rungs], "levels": levels, "trade": trade,
        "measured": {
            "agreement": [round(share, 4) for share in shares], "discrimination": discrimination,
            "gains": {f"{gain:g}": [round(x, 4) for x in found.tolist()] for gain, found in zip(GAINS, believed, strict=True)},
        },
        "auto": auto(chances, stayed, later, rungs, levels, lesson.target),
    }  # fmt: skip
