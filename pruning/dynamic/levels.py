"""Levels: the operator's closed menu of budgets, and the routes made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.route import Route
from models.vision import ImageFeatures
from pruning.dynamic.policies import TokenPolicy, keep_tokens


@dataclass(frozen=True)
class Level:
    """A named budget. It only ever reduces work: `visual_ratio` of each image's tokens, all layers but `skipped_layers`."""

    name: str
    description: str
    visual_ratio: float
    skipped_layers: int = 0
    card: dict[str, Any] | None = None

    def kept(self, visual_tokens: int) -> int:
        """Visual tokens kept of one image's; at least one, so that no picture vanishes."""
        return max(1, round(visual_tokens * self.visual_ratio)) if visual_tokens else 0


# Shares of tokens follow the field's 1/3, 2/9 and 1/9; whole-layer skipping has a small safe set and comes late.
_BUDGETS = (("off", 1.0, 0.0), ("light", 2 / 3, 0.0), ("balanced", 1 / 3, 0.0), ("strong", 1 / 6, 1 / 16))


def build_menu(
    layer_change: Sequence[float] | None, layers: int, cards: dict[str, dict[str, Any]] | None = None
) -> dict[str, Level]:
    """The menu for a model of `layers` layers. Without a calibration no level skips a layer: nobody knows which it may."""
    menu = {}
    for name, ratio, skip in _BUDGETS:
        skipped = int(layers * skip) if layer_change else 0
        text = "the whole model" if name == "off" else f"{ratio:.0%} of the visual tokens, {layers - skipped} of {layers} layers"
        menu[name] = Level(name, text, ratio, skipped, (cards or {}).get(name))
    return menu


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


def expected_rows(level: Level, prompt: int, images: int, visual_tokens_per_image: int, layers: int) -> int:
    """Rows of keys and values that a prompt will hold in all layers together; known before the route is made."""
    dropped = images * (visual_tokens_per_image - level.kept(visual_tokens_per_image))
    return (prompt - dropped) * (layers - level.skipped_layers)


def make_route(
    level: Level, images: Sequence[ImageFeatures], layers: int, layer_change: Sequence[float] | None,
    policy: TokenPolicy, seed: int, scores: Tensor | None = None,
) -> tuple[Route, Tensor | None]:  # fmt: skip
    """The route of one request, and its visual tokens [all images' tokens, width] (None without images).

    `scores` [images, visual tokens] are the router's, for the policy of that name.
    """
    runs = layers_to_run(layers, level.skipped_layers, layer_change)
    if not images:
        return Route(0, (), runs), None
    kept: list[int] = []
    sizes: list[int] = []
    parts, start = [], 0
    for number, image in enumerate(images):
        tokens, attention = image.tokens[0], image.attention[0]
        own = None if scores is None else scores[number]
        chosen = keep_tokens(policy, tokens, attention, level.kept(len(tokens)), seed, own)
        kept += [start + i for i in chosen.indices.tolist()]
        sizes += chosen.sizes
        parts.append(chosen.tokens)
        start += len(tokens)
    return Route(start, tuple(kept), runs, sizes=tuple(sizes)), torch.cat(parts)
