"""The planner: what a request may hold before anything is known of it, and how it runs once its pictures are encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.families import Layout
from models.flops import flops_ratio, prefill_flops
from models.manifest import MANIFEST
from models.route import Route
from models.vision.features import ImageFeatures
from pruning.dynamic.levels import AUTO, Level, OperatingPoint, check_patch_ratio, fixed_menu, layers_to_freeze, layers_to_run
from pruning.dynamic.router import RequestRouting, RouterFailed, score_request, text_window
from pruning.dynamic.router_file import RouterRecord, load_router
from pruning.dynamic.token_merging import KeptTokens, merge_tokens
from pruning.dynamic.token_policy import TokenPolicy


@dataclass(frozen=True)
class Reservation:
    """The most that a request may hold: `cache_rows` of keys and values in all layers together, `prefill_tokens` in a layer."""

    cache_rows: int
    prefill_tokens: int


@dataclass(frozen=True)
class Estimate:
    """What a request would run at an operating point: visual tokens kept of all images', layers, those of them frozen for visual
    tokens, and prefill FLOPs of the language model, over the dense ones as a ratio. A router's own work is left out."""

    visual_tokens: int
    layers: int
    frozen_layers: int
    flops: int
    flops_ratio: float


@dataclass(frozen=True)
class Plan:
    """How one request runs: its route, and `visual` [all images' tokens, width] as it uses them (None without images).

    `level` is what was asked for, or `off` where the router failed, and `reason` says which. `expected_agreement` is the
    probability that the answer is the un-pruned model's, where a router chose; `flops_ratio` counts the router's own work. `point`
    was chosen, by `routing` where there was a choice.
    """

    level: str
    reason: str
    route: Route
    visual: Tensor | None
    flops_ratio: float
    expected_agreement: float | None = None
    point: OperatingPoint = field(default_factory=OperatingPoint)
    routing: RequestRouting | None = None


class Planner:
    """Plans requests for one checkpoint, by its router where it has one.

    Raises CheckpointError for a router that does not fit, ValueError for policy `router` without one.
    """

    def __init__(self, checkpoint: Checkpoint, token_policy: TokenPolicy | None = None) -> None:
        self.model = checkpoint.model
        self.layer_change = checkpoint.manifest.layer_change
        self.router = load_router(checkpoint)
        self.token_policy: TokenPolicy = token_policy or ("router" if self.router else "merging")
        if self.token_policy == "router" and not self.router:
            raise ValueError(f"{checkpoint.directory} has no router; train one with `espalier route`, or name another policy")
        self.menu = load_menu(checkpoint, routed=self.token_policy == "router")

    def reserve(self, level: str, prompt_tokens: int, images: Sequence[Layout], max_new_tokens: int) -> Reservation:
        """The most that any plan for this request will hold."""
        layers, points = self.model.num_layers, self.menu[level].operating_points
        prefill = [prompt_tokens - sum(_fewest_dropped(point, image) for image in images) for point in points]
        rows = [(n + max_new_tokens) * (layers - point.skipped_layers) for n, point in zip(prefill, points, strict=True)]
        return Reservation(max(rows), max(prefill))

    def estimate(self, level: str, prompt_tokens: int, images: Sequence[Layout]) -> list[Estimate]:
        """What a request would run at a level: first at the operating point that is nearest to the level's average, then, where a
        router chooses, at each."""
        asked = self.menu[level]
        typical = min(asked.operating_points, key=lambda point: abs(point.visual_ratio - asked.visual_ratio))
        points = [typical, *(asked.operating_points if asked.routed else ())]
        return [self._estimate(point, prompt_tokens, images) for point in points]

    def _estimate(self, point: OperatingPoint, prompt_tokens: int, images: Sequence[Layout]) -> Estimate:
        total = sum(image.visual_tokens for image in images)
        kept = total - sum(_fewest_dropped(point, image) for image in images)
        runs = layers_to_run(self.model.num_layers, point.skipped_layers, self.layer_change)
        frozen = layers_to_freeze(runs, point.frozen_layers if images else 0, [0.0] * len(runs))
        route = Route(total, tuple(range(kept)), runs, frozen)
        flops, dense = (prefill_flops(self.model.config, one, prompt_tokens) for one in (route, Route.full(total, len(runs))))
        return Estimate(kept, sum(runs), len(frozen), flops, round(flops / dense, 4))

    def expected_rows(self, level: str, prompt_tokens: int, images: Sequence[Layout]) -> float:
        """Rows of prefill in all layers together that a request at a level takes on average."""
        dropped = sum(image.visual_tokens for image in images) * (1 - self.menu[level].visual_ratio)
        return (prompt_tokens - dropped) * self.model.num_layers

    def plan(
        self, level: str, reason: str, prompt: Sequence[int], images: Sequence[ImageFeatures], *, follow_up: bool = False
    ) -> Plan:
        """Choose the operating point, and make the route. A router that fails leaves level `off`, which reserved no more."""
        asked = self.menu[level]
        point, expected, routing = asked.operating_points[-1], None, None
        try:
            if asked.routed and self.router and images:
                text = text_window(prompt, self.model.config.image_token_id)
                routing = score_request(self.router, self.model, images, text)
                point, expected = asked.choose(routing.expected_agreement, follow_up=follow_up)
            route, visual = make_route(point, images, self.model.num_layers, self.layer_change, routing)
        except RouterFailed:
            return self.plan("off", f"the router failed at level {level}", prompt, images)
        own = routing.flops(len(route.kept_tokens) // len(images)) if routing else 0
        ratio = flops_ratio(self.model.config, route, len(prompt), own)
        return Plan(level, reason, route, visual, ratio, expected, point, routing)


def load_menu(checkpoint: Checkpoint, *, routed: bool = True) -> dict[str, Level]:
    """The menu that a checkpoint's manifest describes; without the router (`routed`) its budgets are not what was measured.

    Raises CheckpointError for what it says of levels that there are not.
    """
    manifest = checkpoint.manifest
    menu = fixed_menu(manifest.layer_change, checkpoint.model.num_layers, manifest.cards)
    if record := RouterRecord.of(manifest) if routed else None:
        menu |= _routed_menu(record, manifest.cards)
    try:
        check_patch_ratio(manifest.patch_ratio)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.directory / MANIFEST}: {error}") from error
    layer = checkpoint.model.vision.tower.merge_layer
    for name, ratio in manifest.patch_ratio.items():
        text = f"{menu[name].description}; the vision tower sees {ratio:.0%} of its patches from layer {layer} on"
        menu[name] = replace(menu[name], description=text, patch_ratio=ratio)
    return menu


def _routed_menu(record: RouterRecord, cards: Mapping[str, dict[str, Any]]) -> dict[str, Level]:
    menu = {}
    for name, weights in record.levels.items():
        first = weights.first
        target = f"{record.training['target_agreement']:.0%}"
        wanted = f"aims to keep {target} of all answers; expected" if name == AUTO else "what the question needs; budgeted"
        cost = f"{first.visual_ratio:.0%} of the visual tokens and {first.flops_ratio:.0%} of the FLOPs"
        # `auto` promises what was measured: of follow-ups nothing was, and they run whole.
        unmeasured = 0.0 if name == AUTO else first.cost_weight
        second = weights.follow_up.cost_weight if weights.follow_up else unmeasured
        text = f"{wanted}, on average: {cost}"
        menu[name] = Level(name, text, first.visual_ratio, record.operating_points, first.cost_weight, second, cards.get(name))
    return menu


def make_route(
    point: OperatingPoint, images: Sequence[ImageFeatures], layers: int, layer_change: Sequence[float] | None,
    routing: RequestRouting | None = None,
) -> tuple[Route, Tensor | None]:  # fmt: skip
    """A request's route at an operating point, and its visual tokens. Without `routing` tokens are merged by the picture alone, and
    no layer is frozen."""
    runs = layers_to_run(layers, point.skipped_layers, layer_change)
    if not images:
        return Route(0, (), runs), None
    if routing is None:
        return join([_merge(point, image) for image in images], runs)
    kept = routing.keep_tokens(point.kept(routing.visual.shape[1]))
    return join(kept, runs, layers_to_freeze(runs, point.frozen_layers, routing.layer_scores))


def _fewest_dropped(point: OperatingPoint, layout: Layout) -> int:
    """Visual tokens of a picture that go at an operating point, if every one that stays keeps a newline."""
    pictured = layout.visual_tokens - len(layout.newlines)
    return layout.visual_tokens - layout.most_tokens(point.kept(pictured))


def _merge(point: OperatingPoint, image: ImageFeatures) -> KeptTokens:
    """A picture's tokens, merged by themselves. Newlines are no part of it: each goes when all others of its row have gone."""
    tokens, layout = image.tokens[0], image.layout
    if layout is None or not layout.newlines:
        return merge_tokens(tokens, point.kept(len(tokens)))
    is_newline = torch.zeros(len(tokens), dtype=torch.bool)
    is_newline[list(layout.newlines)] = True
    pictured = (~is_newline).nonzero()[:, 0].to(tokens.device)
    if (keep := point.kept(len(pictured))) == len(pictured):
        return KeptTokens.all(tokens)
    merged = merge_tokens(tokens[pictured], keep)
    stay = pictured[merged.indices]
    sizes = dict(zip(stay.tolist(), merged.sizes, strict=True)) | dict.fromkeys(layout.newlines_of(stay.tolist()), 1)
    indices = sorted(sizes)
    return KeptTokens(
        torch.tensor(indices, device=tokens.device), tokens.index_copy(0, pictured, merged.tokens), tuple(sizes[i] for i in indices)
    )


def join(
    kept: Sequence[KeptTokens], runs: tuple[bool, ...], frozen_layers: frozenset[int] = frozenset()
) -> tuple[Route, Tensor]:
    """A route of all images' kept tokens, and their visual tokens [all images' tokens, width]."""
    indices: list[int] = []
    sizes: list[int] = []
    start = 0
    for one in kept:
        indices += [start + i for i in one.indices.tolist()]
        sizes += one.sizes or [1] * len(one.indices)
        start += len(one.tokens)
    merged = any(one.sizes for one in kept)  # not where every picture keeps all
    route = Route(start, tuple(indices), runs, frozen_layers=frozen_layers, token_sizes=tuple(sizes) if merged else ())
    return route, torch.cat([one.tokens for one in kept])
