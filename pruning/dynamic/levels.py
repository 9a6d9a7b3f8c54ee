"""Levels: the operator's closed menu of budgets, and the routes made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.checkpoint import Manifest
from models.route import Route
from models.vision import ImageFeatures
from pruning.dynamic.policies import TokenPolicy, keep_tokens
from pruning.dynamic.router import Reading

AUTO = "auto"
"""The level of a request that takes the cheapest level expected to keep its answer."""


@dataclass(frozen=True)
class Level:
    """A named budget. It only ever reduces work: `visual_ratio` of each image's tokens, all layers but `skipped_layers`, and of
    those that run `passed_layers` for text rows alone, which needs a router."""

    name: str
    description: str
    visual_ratio: float
    skipped_layers: int = 0
    passed_layers: int = 0
    card: dict[str, Any] | None = None

    def kept(self, visual_tokens: int) -> int:
        """Visual tokens kept of one image's; at least one, so that no picture vanishes."""
        return max(1, round(visual_tokens * self.visual_ratio)) if visual_tokens else 0

    @property
    def routed(self) -> bool:
        """Whether there is anything for a router to choose."""
        return self.visual_ratio < 1 or self.passed_layers > 0 or self.name == AUTO


# Shares of tokens follow the field's 2/3, 1/3 and 1/6; whole-layer skipping has a small safe set and comes late.
_BUDGETS = (("off", 1.0, 0.0), ("light", 2 / 3, 0.0), ("balanced", 1 / 3, 0.0), ("strong", 1 / 6, 1 / 16))
PRUNED = tuple(name for name, _, _ in _BUDGETS[:0:-1])
"""The levels that leave something out, cheapest first."""


def build_menu(
    layer_change: Sequence[float] | None, layers: int, cards: Mapping[str, dict[str, Any]] | None = None,
    measured: Mapping[str, Mapping[str, Any]] | None = None, auto: str = "",
) -> dict[str, Level]:  # fmt: skip
    """The menu for a model of `layers` layers.

    Without a calibration no level skips a layer: nobody knows which it may. `measured` are the budgets that `espalier route` found
    for this checkpoint, by level: visual_ratio, skipped_layers and passed_layers. `auto` describes that level, where there is one.
    """
    menu = {}
    for name, ratio, skip in _BUDGETS:
        skipped = int(layers * skip) if layer_change else 0
        level = replace(Level(name, "", ratio, skipped), **(measured or {}).get(name, {}))
        menu[name] = replace(level, description=_describe(level, layers), card=(cards or {}).get(name))
    if auto:
        menu[AUTO] = Level(AUTO, auto, 1.0, card=(cards or {}).get(AUTO))
    return menu


def menu_of(manifest: Manifest, layers: int, *, routed: bool = True) -> dict[str, Level]:
    """The menu that a checkpoint's manifest describes; without the router (`routed`) its budgets are not what was measured."""
    if not routed or manifest.router is None:
        return build_menu(manifest.layer_change, layers, manifest.cards)
    target = manifest.router.auto["target"]
    auto = f"the cheapest level that is expected to keep the answer, so that {target:.0%} of all answers stay"
    return build_menu(manifest.layer_change, layers, manifest.cards, manifest.router.levels, auto)


def _describe(level: Level, layers: int) -> str:
    if level.name == "off":
        return "the whole model"
    text = f"{level.visual_ratio:.0%} of the visual tokens, {layers - level.skipped_layers} of {layers} layers"
    return text + (f", {level.passed_layers} of them for text alone" if level.passed_layers else "")


def layers_to_run(layers: int, skipped: int, layer_change: Sequence[float] | None) -> tuple[bool, ...]:
    """All layers but the `skipped` ones that change the hidden state least (ShortGPT's block influence, arXiv 2403.03853).

    The first and the last layer always run: everyone who measured found them indispensable.
    """
    if not skipped:
        return (True,) * layers
    if layer_change is None or len(layer_change) != layers:
        raise ValueError(f"skipping layers needs a calibration of all {layers} layers; run `espalier calibrate`")
    idle = set(sorted(range(1, layers - 1), key=lambda layer: layer_change[layer])[:skipped])
    return tuple(layer not in idle for layer in range(layers))


def layers_passed(runs: Sequence[bool], passed: int, costs: Sequence[float]) -> frozenset[int]:
    """The `passed` layers among those that run, the first and the last aside, in which visual rows cost least to leave alone."""
    inner = [layer for layer in range(1, len(runs) - 1) if runs[layer]]
    return frozenset(sorted(inner, key=lambda layer: costs[layer])[:passed])


def cheapest_level(chances: Sequence[float], threshold: float) -> str:
    """The cheapest level whose chance of keeping the answer reaches the threshold (`chances` in the order of PRUNED), or `off`."""
    return next((name for name, chance in zip(PRUNED, chances, strict=True) if chance >= threshold), "off")


def expected_rows(level: Level, prompt: int, images: int, visual_tokens_per_image: int, layers: int) -> int:
    """Rows of keys and values that a prompt will hold in all layers together; known before the route is made."""
    dropped = images * (visual_tokens_per_image - level.kept(visual_tokens_per_image))
    return (prompt - dropped) * (layers - level.skipped_layers)


def make_route(
    level: Level, images: Sequence[ImageFeatures], layers: int, layer_change: Sequence[float] | None,
    policy: TokenPolicy, seed: int, reading: Reading | None = None,
) -> tuple[Route, torch.Tensor | None]:  # fmt: skip
    """The route of one request, and its visual tokens [all images' tokens, width] (None without images).

    `reading` is the router's, which policy `router` and layers that visual rows pass by need.
    """
    runs = layers_to_run(layers, level.skipped_layers, layer_change)
    if not images:
        return Route(0, (), runs), None
    kept: list[int] = []
    sizes: list[int] = []
    parts, start = [], 0
    for number, image in enumerate(images):
        tokens, attention = image.tokens[0], image.attention[0]
        keep = level.kept(len(tokens))
        chosen = reading.keep(number, keep) if reading else keep_tokens(policy, tokens, attention, keep, seed)
        kept += [start + i for i in chosen.indices.tolist()]
        sizes += chosen.sizes
        parts.append(chosen.tokens)
        start += len(tokens)
    passed = layers_passed(runs, level.passed_layers, reading.costs) if reading and level.passed_layers else frozenset()
    return Route(start, tuple(kept), runs, visual_stays=passed, sizes=tuple(sizes)), torch.cat(parts)
