"""A world of small drawings with questions about them, made by Pillow from seeds, without files.

The embedded checkpoints were trained on it; calibration and evaluation draw from other splits and seeds. Four families: shapes,
signs, bar charts and boards.
"""

from __future__ import annotations

from random import Random

from checkpoints.world import charts, grids, shapes, signs
from checkpoints.world.scene import COLORS, SIZE, Drill, Mark, Question, Scene

__all__ = ["COLORS", "FAMILIES", "SIZE", "SPLITS", "Drill", "Mark", "Question", "Scene", "draw", "question_types"]

_DRAW = {"shapes": shapes, "signs": signs, "charts": charts, "grids": grids}
FAMILIES = tuple(_DRAW)
SPLITS = ("train", "validation", "test")
WHATS = (*shapes.WHATS, *signs.WHATS, *charts.WHATS, *grids.WHATS)
"""Every kind of thing that a `Mark` may name."""


def draw(split: str, index: int, family: str | None = None) -> Scene:
    """Picture number `index` of a split, of a family or of the families in turn. The same arguments give the same picture."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    family = family or FAMILIES[index % len(FAMILIES)]
    if family not in _DRAW:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    return _DRAW[family].draw(Random(f"{split}/{family}/{index}"))


def question_types(family: str) -> tuple[str, ...]:
    """The types of question that are asked about a family's pictures."""
    return _DRAW[family].TYPES
