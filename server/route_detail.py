"""What a reply can show of its own route: which tokens stay, what each stands for, and what the other operating points would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from models.flops import flops_ratio
from models.route import Route
from models.vision.features import ImageFeatures
from pruning.dynamic.levels import layers_to_freeze, layers_to_run
from pruning.dynamic.planner import Plan, Planner, make_route
from pruning.dynamic.router import RequestRouting, select_tokens
from pruning.dynamic.token_merging import choose_tokens


@dataclass(frozen=True)
class LayerKinds:
    """Numbers of the layers that run whole, of those that run for text rows alone, and of those that do not run."""

    run: tuple[int, ...]
    frozen: tuple[int, ...]
    skipped: tuple[int, ...]

    @classmethod
    def of(cls, route: Route) -> LayerKinds:
        skipped = tuple(layer for layer, runs in enumerate(route.layers) if not runs)
        run = tuple(layer for layer, runs in enumerate(route.layers) if runs and layer not in route.frozen_layers)
        return cls(run, tuple(sorted(route.frozen_layers)), skipped)


@dataclass(frozen=True)
class PointDetail:
    """An operating point, as this request runs or would run at it. `visual_tokens` are those kept of all images'."""

    visual_tokens: int
    layers: LayerKinds
    flops_ratio: float
    expected_agreement: float | None
    chosen: bool


@dataclass(frozen=True)
class RouteDetail:
    """A route in full. Tokens are numbered over all images, each row by row.

    `token_sizes`: how many tokens each of `kept_tokens` stands for. `token_scores`, where a router ran: the logarithm of the
    attention that it foresees for each token. `merged_into`: by the number of tokens kept at an operating point, for each token
    the kept one that stands for it; where all are kept, each stands for itself and nothing is listed. Of tiled pictures nothing is
    listed either.
    """

    kept_tokens: tuple[int, ...]
    token_sizes: tuple[int, ...]
    token_scores: tuple[float, ...] | None
    merged_into: dict[int, tuple[int, ...]]
    layers: LayerKinds
    operating_points: tuple[PointDetail, ...]


@torch.inference_mode()
def explain(planner: Planner, plan: Plan, images: Sequence[ImageFeatures], prompt_tokens: int) -> RouteDetail:
    """A plan's route in full. It is for people who look, takes as long as routing or longer, and changes nothing."""
    model, route, routing = planner.model, plan.route, plan.routing
    merged: dict[int, tuple[int, ...]] = {}
    details = []
    for place, point in enumerate(planner.menu[plan.level].operating_points):
        kept_per_image = point.kept(model.visual_tokens_per_image)
        kept = tuple(range(route.visual_tokens))
        if any(image.layout for image in images):  # tiles and newlines make no square: which tokens stay is all that is told
            kept = make_route(point, images, model.num_layers, planner.layer_change)[0].kept_tokens
        elif images and kept_per_image < model.visual_tokens_per_image:
            count = kept_per_image * len(images)
            merged[count] = owners = merged.get(count) or stands_for(images, kept_per_image, routing)
            kept = tuple(sorted(set(owners)))
        runs = layers_to_run(model.num_layers, point.skipped_layers, planner.layer_change)
        frozen = layers_to_freeze(runs, point.frozen_layers, routing.layer_scores) if routing else frozenset()
        other = Route(route.visual_tokens, kept, runs, frozen)
        own = routing.flops(kept_per_image) if routing else 0
        expected = round(routing.expected_agreement[place], 4) if routing else None
        ratio = round(flops_ratio(model.config, other, prompt_tokens, own), 4)
        details.append(PointDetail(len(kept), LayerKinds.of(other), ratio, expected, point is plan.point))
    scores = tuple(round(score, 2) for score in routing.output.token_scores.flatten().tolist()) if routing else None
    sizes = route.token_sizes or (1,) * len(route.kept_tokens)
    return RouteDetail(route.kept_tokens, sizes, scores, merged, LayerKinds.of(route), tuple(details))


def stands_for(images: Sequence[ImageFeatures], keep: int, routing: RequestRouting | None) -> tuple[int, ...]:
    """For each token of all images, the kept one that stands for it, where `keep` of each image stay."""
    visual = torch.cat([image.tokens for image in images])
    kept, shares = select_tokens(routing.output, visual, keep) if routing else choose_tokens(visual, keep)
    starts = torch.arange(len(visual), device=visual.device)[:, None] * visual.shape[1]
    return tuple((starts + kept.gather(1, shares.argmax(-1))).flatten().tolist())
