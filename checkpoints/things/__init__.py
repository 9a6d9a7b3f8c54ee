"""A world of things, drawn by the hands of several designers, and what is asked about them.

Splits never share a seed. `train` draws with the training hands and changes every drawing much; `known` draws with the same hands
and changes little; `validation` draws with a hand that is never trained on, for choosing between models; `test` with another.
"""

from __future__ import annotations

from random import Random

from checkpoints.things import boards, catalogue, charts, shapes, signs, things
from checkpoints.things.scene import SIZE, Box, Mark, Question, Scene, matches, normalize

__all__ = [
    "FAMILIES", "HANDS", "NAMES", "SIZE", "SPLITS", "TURNS", "Box", "Mark", "Question", "Scene", "draw", "matches", "normalize",
]  # fmt: skip

_TRAINING = ("noto", "noto-v1", "twemoji", "fluent-emoji", "fluent-emoji-flat", "fluent-emoji-high-contrast", "emojione",
             "streamline-emojis")  # fmt: skip
HANDS = {"train": _TRAINING, "known": _TRAINING, "validation": ("fxemoji",), "test": ("openmoji",)}
"""The hands that draw each split."""
SPLITS = tuple(HANDS)
_DRAW = {
    "one": things.draw_one,
    "several": things.draw_several,
    "text": signs.draw,
    "charts": charts.draw,
    "boards": boards.draw,
    "shapes": shapes.draw,
}
FAMILIES = tuple(_DRAW)
TURNS = ("one", "several", "text", "one", "several", "shapes", "one", "several", "charts", "boards")
"""The families in the order in which they take turns: the things most often, for they have the most to be learned."""
NAMES = tuple(catalogue.load())
"""The names of all things."""


def draw(
    split: str,
    index: int,
    family: str | None = None,
    *,
    size: int = SIZE,
    paraphrase: str = "seen",
    hands: tuple[str, ...] | None = None,
) -> Scene:
    """Scene number `index` of a split; families take turns unless one is named. Same arguments, same scene.

    `paraphrase` is `seen` or `held_out`: the wordings trained on, or others. `hands` replaces the split's own; the test hand draws
    for the test split alone. Raises ValueError for a split, family, paraphrase or hand that there is not.
    """
    family = family or TURNS[index % len(TURNS)]
    given = (("split", split, SPLITS), ("family", family, FAMILIES), ("paraphrase", paraphrase, ("seen", "held_out")))
    for what, value, known in given:
        if value not in known:
            raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")
    hands = hands or HANDS[split]
    if split != "test" and set(hands) & set(HANDS["test"]):
        raise ValueError(f"{HANDS['test'][0]} is the test hand; it draws for the test split alone")
    return _DRAW[family](Random(f"{split}/{family}/{index}"), hands, size, paraphrase, split == "train")
