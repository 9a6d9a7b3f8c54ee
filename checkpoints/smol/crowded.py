"""Pictures crowded with things, for naming places: four to sixteen things in each, and sometimes one that fills it."""

from __future__ import annotations

from random import Random

import numpy as np
from PIL import Image

from checkpoints import things
from checkpoints.things import drawings, paint
from checkpoints.things.things import drawable

SIDE = 17
"""Visual tokens along a side of a picture."""
ALONE = 0.2
"""Share of pictures with a single thing."""


def draw(index: int, hands: tuple[str, ...] = things.HANDS["train"]) -> tuple[Image.Image, np.ndarray]:
    """Crowded picture number `index`, and what each place shows: int16 [SIDE, SIDE], 1 + the thing's number in NAMES; 0 is none."""
    rng = Random(f"crowded/{index}")
    side = things.SIZE
    canvas, _ = paint.ground(rng, side)
    labels = np.zeros((SIDE, SIDE), np.int16)
    known = drawable(hands)
    for x, y, longest in _spots(rng, side):
        name, pairs = rng.choice(known)
        hand = rng.choice(sorted({hand for hand, _ in pairs}))
        image = drawings.drawing(hand, rng.choice([icon for by, icon in pairs if by == hand]))
        image = paint.fit(rng, paint.vary(rng, image), longest, strong=True)
        left, top = round(x - image.width / 2), round(y - image.height / 2)
        paint.place(rng, canvas, image, left, top)
        alpha = Image.new("L", (side, side))
        alpha.paste(image.getchannel("A"), (left, top))
        covered = np.asarray(alpha.resize((SIDE, SIDE), Image.Resampling.BOX), float) / 255
        labels[covered >= min(0.35, 0.6 * max(covered.max(), 0.01))] = 1 + things.NAMES.index(name)
    return paint.shoot(rng, canvas, strong=True), labels


def _spots(rng: Random, side: int) -> list[tuple[float, float, float]]:
    """Centers and longest sides in pixels: one, or a grid that is not quite kept to."""
    if rng.random() < ALONE:
        longest = rng.uniform(0.33, 0.95) * side
        slack = (side - longest) / 2
        return [(side / 2 + rng.uniform(-slack, slack), side / 2 + rng.uniform(-slack, slack), longest)]
    across = rng.choices((2, 3, 4), (0.25, 0.45, 0.3))[0]
    cell = side / across
    spots = []
    for row in range(across):
        for column in range(across):
            longest = cell * rng.uniform(0.6, 1.1)
            x, y = ((i + 0.5) * cell + rng.uniform(-0.15, 0.15) * longest for i in (column, row))
            spots.append((x, y, longest))
    rng.shuffle(spots)
    return spots
