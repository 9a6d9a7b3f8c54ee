"""What a router makes of pictures that it never learned from: which answers stay at each operating point, and the cost weights at
which levels spend what they are meant to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor

from models.checkpoint import Checkpoint
from models.flops import flops_ratio
from models.route import Route
from models.run_state import RunState
from pruning.dynamic.levels import OperatingPoint, layers_to_freeze, layers_to_run
from pruning.dynamic.planner import make_route
from pruning.dynamic.router import MAX_TEXT, Router, RouterConfig, score_request
from pruning.dynamic.router_file import RouterRecord
from pruning.dynamic.training.agreement import HeldOut, area_under_roc, find_levels, fit_and_validate, sweep
from pruning.dynamic.training.config import TrainingConfig
from pruning.dynamic.training.dataset import RouterDataset
from pruning.dynamic.training.loop import explained_variance, score
from pruning.dynamic.training.teacher import margins

SHARES = (1 / 36, 1 / 18, 1 / 12, 1 / 9, 1 / 6, 2 / 9, 1 / 3, 1 / 2, 1.0)
"""Of the visual tokens, that an operating point may keep."""
FROZEN = (0.0, 3 / 8)
"""Shares of the layers that may be frozen for visual tokens: three eighths was best where budgets are small, none where not."""
SKIPPED = (0.0, 1 / 16)
"""Shares of the layers that may be skipped, where `espalier calibrate` has measured them."""


def grid(source: Checkpoint) -> list[tuple[float, int, int]]:
    """Every share of the tokens with every number of layers skipped and frozen."""
    skipped, frozen = (
        sorted({int(source.model.num_layers * share) for share in shares})
        for shares in (SKIPPED if source.manifest.calibration else SKIPPED[:1], FROZEN)
    )
    return list(product(SHARES, skipped, frozen))


def operating_points(source: Checkpoint, config: RouterConfig, text: int) -> list[OperatingPoint]:
    """What a router chooses from, cheapest first and the whole model last; `text` is how many text tokens a typical prompt has."""
    model = source.model
    visual = model.visual_tokens_per_image
    found = []
    for share, skipped, frozen in grid(source):
        point = OperatingPoint(share, skipped, frozen)
        kept = point.kept(visual)
        runs = layers_to_run(model.num_layers, skipped, range(model.num_layers))
        frozen_layers = layers_to_freeze(runs, frozen, range(model.num_layers))
        route = Route(visual, tuple(range(kept)), runs, frozen_layers=frozen_layers)
        cost = flops_ratio(model.config, route, visual + text, config.flops(visual, min(text, MAX_TEXT), kept))
        found.append(replace(point, cost=round(cost, 4)))
    return sorted(found, key=lambda point: (_is_whole(point), point.cost))


def _is_whole(point: OperatingPoint) -> bool:
    """Whether it leaves nothing out. It need not be the dearest: of large routers the correction may cost more than it saves."""
    return (point.visual_ratio, point.skipped_layers, point.frozen_layers) == (1.0, 0, 0)


def profile(
    config: TrainingConfig, source: Checkpoint, router: Router, data: RouterDataset, state: RunState, progress: Progress
) -> RouterRecord:
    """Fit `router.agreement` and find the levels' cost weights, all on held-out questions. Returns the manifest's section."""
    held_out = data.of((data.picture >= config.training_pictures).nonzero()[:, 0])
    points = operating_points(source, router.config, int((data.prompt >= 0).sum(1).median()))
    served, embed = router.serving(source.model.dtype), source.model.embed
    task = progress.add_task("profiling", total=len(held_out.picture) * (len(points) - 1))
    stored = state.read_tensors("margins")
    if stored is None:
        found = measure(points[:-1], source, served, held_out, lambda done: progress.advance(task, done))
        state.write_tensors("margins", {"margins": found}, {})
    else:
        found = stored[0]["margins"]
    with torch.no_grad():
        outputs = [score(served, embed, held_out.of(part)).output for part in torch.split(torch.arange(len(found)), 64)]
        features = torch.cat([served.pooled_features(output) for output in outputs]).cpu()
    head, expected = fit_and_validate(features, found, held_out.picture, router.config.agreement_width)
    router.agreement.load_state_dict(head.state_dict())
    stayed = F.pad(found > 0, (0, 1), value=True)
    shares = [round(share, 4) for share in stayed.float().mean(0).tolist()]
    points = [replace(point, agreement=share) for point, share in zip(points, shares, strict=True)]
    measured = HeldOut(F.pad(expected, (0, 1), value=1.0), stayed, points)
    first = measured.of(~held_out.follow_up)
    return RouterRecord(
        config=router.config, checkpoint=source.fingerprint, training=config.model_dump(), operating_points=tuple(points),
        levels=find_levels(measured, held_out.follow_up, config.target_agreement), cost_weight_sweep=sweep(first),
        report={
            "questions": len(data.picture), "learned_questions": len(data.picture) - len(held_out.picture),
            "explained_variance": explained_variance(router, embed, held_out),
            "area_under_roc": [area_under_roc(expected[:, i], stayed[:, i]) for i in range(expected.shape[1])],
        },
    )  # fmt: skip


def measure(
    points: Sequence[OperatingPoint], source: Checkpoint, router: Router, data: RouterDataset, advance: Callable[[int], None]
) -> Tensor:
    """By how much each answer stays ahead at each point, see `teacher.margins`: float32 [questions, points]. All questions about a
    picture are one pass."""
    found = torch.zeros(len(data.picture), len(points))
    model, change = source.model, source.manifest.layer_change
    for picture in torch.unique(data.picture):
        here = (data.picture == picture).nonzero()[:, 0]
        prompts, routings, answers = [], [], []
        for question in here.tolist():
            prompt, text, answer = data.example(question, model.config.image_token_id)
            prompts.append(replace(prompt, visual=prompt.visual.to(model.device)))
            routings.append(score_request(router, model, [prompts[-1].image], text))
            answers.append(answer)
        for place, point in enumerate(points):
            routes, routed = [], []
            for prompt, routing in zip(prompts, routings, strict=True):
                route, visual = make_route(point, [prompt.image], model.num_layers, change, routing)
                assert visual is not None
                routes.append(route)
                routed.append(replace(prompt, visual=visual))
            found[here, place] = torch.tensor(margins(model, routed, answers, routes))
            advance(len(here))
    return found
