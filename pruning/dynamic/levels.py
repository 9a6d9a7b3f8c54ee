"""Levels: the operator's closed menu. A level is a cost weight over operating points, from which each request takes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

Share = Annotated[float, Field(ge=0, le=1)]

AUTO = "auto"
"""The level that keeps a target share of all answers, at the least cost."""
SIZES = (("off", 1.0, 0.0), ("light", 2 / 3, 0.0), ("balanced", 1 / 3, 0.0), ("strong", 1 / 6, 1 / 16))
"""Without a router: each level's share of the visual tokens (the field's 2/3, 1/3 and 1/6) and of the layers to skip, which have a
small safe set."""


@dataclass(frozen=True)
class OperatingPoint:
    """One way to run a request: `visual_ratio` of each image's tokens, all layers but `skipped_layers`, and of those that run
    `frozen_layers` for text rows alone, which needs a router.

    `cost` is its share of a typical prompt's dense prefill FLOPs, the router's own included; `agreement` the share of held-out
    answers that stayed.
    """

    visual_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    skipped_layers: Annotated[int, Field(ge=0)] = 0
    frozen_layers: Annotated[int, Field(ge=0)] = 0
    cost: Annotated[float, Field(gt=0, le=2)] = 1.0
    agreement: Share = 1.0

    def kept(self, visual_tokens: int) -> int:
        """Visual tokens kept of one image's; at least one, so that no picture vanishes."""
        return max(1, round(visual_tokens * self.visual_ratio)) if visual_tokens else 0


@dataclass(frozen=True)
class Level:
    """What a request may ask for. With several `operating_points`, the whole model last, a router chooses among them by question;
    `visual_ratio` is what they keep on average. Questions that follow an answer in their chat have a cost weight of their own.
    `patch_ratio` is the share of the patches that the vision tower's later layers see."""

    name: str
    description: str
    visual_ratio: float
    operating_points: tuple[OperatingPoint, ...]
    cost_weight: float = 0.0
    follow_up_cost_weight: float = 0.0
    card: dict[str, Any] | None = None
    patch_ratio: float = 1.0

    @property
    def routed(self) -> bool:
        """Whether there is anything for a router to choose."""
        return len(self.operating_points) > 1

    def choose(self, expected_agreement: Sequence[float], *, follow_up: bool = False) -> tuple[OperatingPoint, float]:
        """The operating point of one request, and the probability that its answer stays there."""
        weight = self.follow_up_cost_weight if follow_up else self.cost_weight
        place = int(choose(torch.tensor(expected_agreement, dtype=torch.float32), costs_of(self.operating_points), weight))
        return self.operating_points[place], expected_agreement[place]


def costs_of(points: Sequence[OperatingPoint]) -> Tensor:
    """Their FLOPs ratios, float32 [points]."""
    return torch.tensor([point.cost for point in points], dtype=torch.float32)


def choose(expected_agreement: Tensor, costs: Tensor, cost_weight: float) -> Tensor:
    """The operating point with the least expected loss, int64 [...]: the probability that the answer changes, 1 -
    expected_agreement [..., points], plus `cost_weight` times costs [points].

    Ours. One weight for all requests spends an average budget best: none can give arithmetic to another and both gain.
    """
    return (1 - expected_agreement + cost_weight * costs).argmin(-1)


def fixed_menu(
    layer_change: Sequence[float] | None, layers: int, cards: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, Level]:
    """The menu for a model of `layers` layers that has no router: one operating point a level.

    Without a calibration no level skips a layer: nobody knows which it may.
    """
    menu = {}
    for name, ratio, skip in SIZES:
        skipped = int(layers * skip) if layer_change else 0
        text = f"{ratio:.0%} of the visual tokens, {layers - skipped} of {layers} layers" if ratio < 1 else "the whole model"
        menu[name] = Level(name, text, ratio, (OperatingPoint(ratio, skipped),), card=(cards or {}).get(name))
    return menu


def check_patch_ratio(ratios: Mapping[str, float]) -> None:
    """Raise ValueError for a level that may not see less, or a share that is none. `off` is what all others are compared with, and
    `auto` promises what was measured with the whole tower."""
    allowed = [name for name, *_ in SIZES if name != "off"]
    for name, ratio in ratios.items():
        if name not in allowed:
            raise ValueError(f"patch_ratio {name}: the levels that may have one are {', '.join(allowed)}")
        if not 0 < ratio <= 1:
            raise ValueError(f"patch_ratio {name}: must be above 0 and at most 1, not {ratio:g}")


def read_patch_ratio(given: Sequence[str]) -> dict[str, float]:
    """What the command line says, such as ["strong=0.5"]. Raises ValueError."""
    ratios = {}
    for one in given:
        name, _, share = one.partition("=")
        try:
            ratios[name] = float(share)
        except ValueError as error:
            raise ValueError(f"patch_ratio must be LEVEL=SHARE, such as strong=0.5, not {one[:40]!r}") from error
    check_patch_ratio(ratios)
    return ratios


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


def layers_to_freeze(runs: Sequence[bool], frozen: int, scores: Sequence[float]) -> frozenset[int]:
    """The `frozen` layers with the lowest scores among those that run, the first and the last aside: there visual rows stay as they
    are (ShortV, arXiv 2504.00502)."""
    inner = [layer for layer in range(1, len(runs) - 1) if runs[layer]]
    return frozenset(sorted(inner, key=lambda layer: scores[layer])[:frozen])
