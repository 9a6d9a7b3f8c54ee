"""Levels: the operator's closed menu of budgets, and the routes made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.manifest import Manifest
from models.route import Route
from models.vision.features import ImageFeatures
from pruning.dynamic.router import Reading
from pruning.dynamic.router_file import RouterRecord
from pruning.dynamic.token_merging import TokenPolicy, keep_tokens

AUTO = "auto"
"""The level of a request that takes the level most worth its arithmetic."""


@dataclass(frozen=True)
class Rung:
    """One way to run a request, on the ladder that a router chooses from: shares as in `Level`.

    `cost` is its share of a typical prompt's dense prefill FLOPs, the router's own among them.
    """

    visual_ratio: float
    skipped_layers: int
    passed_layers: int
    cost: float

    @property
    def runs_all_layers(self) -> bool:
        """Whether tokens alone are left out."""
        return not self.skipped_layers and not self.passed_layers


@dataclass(frozen=True)
class Level:
    """A named budget. It only ever reduces work: `visual_ratio` of each image's tokens, all layers but `skipped_layers`, and of
    those that run `passed_layers` for text rows alone, which needs a router.

    With `rungs` it is a budget on average: each request takes the rung that is worth its `price` (see `choose`), and
    `visual_ratio` says what they keep on average.
    """

    name: str
    description: str
    visual_ratio: float
    skipped_layers: int = 0
    passed_layers: int = 0
    card: dict[str, Any] | None = None
    rungs: tuple[Rung, ...] = ()
    price: float = 0.0
    later_price: float = 0.0  # of level `auto`, for a question that follows others in its chat

    def kept(self, visual_tokens: int) -> int:
        """Visual tokens kept of one image's; at least one, so that no picture vanishes."""
        return max(1, round(visual_tokens * self.visual_ratio)) if visual_tokens else 0

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.visual_ratio == 1 and not self.skipped_layers and not self.passed_layers

    @property
    def routed(self) -> bool:
        """Whether there is anything for a router to choose."""
        return self.visual_ratio < 1 or self.passed_layers > 0 or bool(self.rungs)

    def settled(self, chances: Sequence[float]) -> tuple[Level, float]:
        """What it is for one request, given the chance that the answer stays on each rung; and the chance on the rung taken."""
        taken = int(choose(torch.tensor(chances), costs_of(self.rungs), self.price))
        return self.at(self.rungs[taken]), chances[taken]

    def at(self, rung: Rung) -> Level:
        """The level with what a rung leaves out."""
        return replace(
            self, visual_ratio=rung.visual_ratio, skipped_layers=rung.skipped_layers, passed_layers=rung.passed_layers, rungs=()
        )


def costs_of(rungs: Sequence[Rung]) -> torch.Tensor:
    """Their FLOPs ratios, float32 [rungs]."""
    return torch.tensor([rung.cost for rung in rungs])


def choose(chances: torch.Tensor, costs: torch.Tensor, price: float) -> torch.Tensor:
    """The rung with the least expected loss, int64 [...]: the chance that the answer changes, 1 - chances [..., rungs], plus
    `price` times costs [rungs].

    Ours. A price for all requests is what spends an average budget best: none can give arithmetic to another and both gain.
    """
    return (1 - chances + price * costs).argmin(-1)


# Shares of tokens follow the field's 2/3, 1/3 and 1/6; whole-layer skipping has a small safe set and comes late.
_BUDGETS = (("off", 1.0, 0.0), ("light", 2 / 3, 0.0), ("balanced", 1 / 3, 0.0), ("strong", 1 / 6, 1 / 16))
PRUNED = tuple(name for name, _, _ in _BUDGETS[:0:-1])
"""The levels that leave something out, cheapest first."""


def build_menu(
    layer_change: Sequence[float] | None, layers: int, cards: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Level]:
    """The menu for a model of `layers` layers that has no router.

    Without a calibration no level skips a layer: nobody knows which it may.
    """
    menu = {}
    for name, ratio, skip in _BUDGETS:
        skipped = int(layers * skip) if layer_change else 0
        text = f"{ratio:.0%} of the visual tokens, {layers - skipped} of {layers} layers" if ratio < 1 else "the whole model"
        menu[name] = Level(name, text, ratio, skipped, card=(cards or {}).get(name))
    return menu


def menu_of(manifest: Manifest, layers: int, *, routed: bool = True) -> dict[str, Level]:
    """The menu that a checkpoint's manifest describes; without the router (`routed`) its budgets are not what was measured."""
    plain = build_menu(manifest.layer_change, layers, manifest.cards)
    record = RouterRecord.of(manifest) if routed else None
    if record is None:
        return plain
    rungs = rungs_of(record)
    menu = {"off": plain["off"]}
    for name in PRUNED[::-1]:
        found = record.levels[name]
        tokens, flops = found["visual_ratio"], found["flops_ratio"]
        text = f"what the question needs: on average {tokens:.0%} of the visual tokens and {flops:.0%} of the FLOPs"
        menu[name] = replace(
            plain[name], description=text, visual_ratio=tokens, skipped_layers=0, rungs=rungs, price=found["price"]
        )
    text = f"the level that is most worth its arithmetic to this question, so that {record.auto['target']:.0%} of all answers stay"
    first, later = (record.auto[kind]["price"] for kind in ("first", "later"))
    menu[AUTO] = Level(AUTO, text, 1.0, card=manifest.cards.get(AUTO), rungs=rungs, price=first, later_price=later)
    return menu


def rungs_of(record: RouterRecord) -> tuple[Rung, ...]:
    """What a router chooses from, the whole model last."""
    return tuple(Rung(**rung) for rung in record.rungs)


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


def offered(chances: torch.Tensor, costs: torch.Tensor, prices: Sequence[float]) -> torch.Tensor:
    """The rungs that levels at `prices` take, and the whole model behind them, int64 [..., prices + 1]; chances [..., rungs], costs
    [rungs]."""
    whole = torch.full(chances.shape[:-1], len(costs) - 1)
    return torch.stack([*(choose(chances, costs, price) for price in prices), whole], -1)


def worthwhile_level(menu: Mapping[str, Level], chances: Sequence[float], *, later: bool = False) -> tuple[Level, float]:
    """What `auto` takes, as it is for this request, and the chance that the answer stays: the level with the least expected loss at
    the price of `auto` itself, `off` among them. `later`: the question follows others in its chat."""
    rungs, price = menu[AUTO].rungs, menu[AUTO].later_price if later else menu[AUTO].price
    costs, expected = costs_of(rungs), torch.tensor(chances)
    taken = offered(expected, costs, [menu[name].price for name in PRUNED])
    best = int(choose(expected[taken], costs[taken], price))
    rung = int(taken[best])
    if rung == len(rungs) - 1:
        return menu["off"], 1.0
    return menu[PRUNED[best]].at(rungs[rung]), chances[rung]


def expected_rows(level: Level, prompt: int, images: int, visual_tokens_per_image: int, layers: int) -> int:
    """Rows of keys and values that a prompt will hold in all layers together, known before the route is made: the most that a
    level which chooses by question can need."""
    kept = visual_tokens_per_image if level.rungs else level.kept(visual_tokens_per_image)
    return (prompt - images * (visual_tokens_per_image - kept)) * (layers - level.skipped_layers)


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
    return Route(start, tuple(kept), runs, frozen_layers=passed, token_sizes=tuple(sizes)), torch.cat(parts)
