"""What all families of pictures share: the canvas, the colors, and the classes of a scene and its questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TypeVar

from PIL import Image, ImageDraw, ImageFilter

SIZE = 96
"""Width and height of every picture, in pixels."""
SUPERSAMPLE = 2
"""Pictures are drawn this many times larger and then reduced, so that edges are smooth."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
           "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen")  # fmt: skip
COLORS = {
    "red": (214, 40, 40),
    "green": (38, 150, 60),
    "blue": (40, 80, 215),
    "yellow": (242, 214, 40),
    "purple": (140, 50, 170),
    "orange": (245, 135, 25),
    "white": (248, 248, 248),
    "black": (16, 16, 16),
}
# Muted and mid-bright, so that every one of COLORS stands out, black and white included.
BACKDROPS = ((150, 160, 170), (175, 165, 150), (140, 150, 140), (165, 150, 165), (120, 130, 145), (185, 180, 170),
             (130, 120, 115), (155, 175, 180))  # fmt: skip

T = TypeVar("T")
LATTICE = 4
"""Centers of shapes and characters are multiples of this many pixels. A patch of 8 pixels then sees a shape at few offsets, so that a
small vision tower learns from tens of thousands of pictures, not millions."""

Rgb = tuple[int, int, int]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Question:
    type: str
    text: str
    answer: str


@dataclass(frozen=True)
class Drill:
    """Several look-ups of one type in a row, as (key, value) pairs such as ("star", "red"). For training alone.

    To look up a thing by its name or color is what a small model learns last. A question trains one look-up in about fifteen
    tokens, a drill one in four or five.
    """

    type: str
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Mark:
    """A thing in a picture and where it is. The vision tower is pretrained to classify patches by it.

    `box` is left, top, right, bottom in pixels; `detail` is a class with a meaning for each family (size, height, place).
    """

    box: Box
    what: str
    color: str | None
    detail: int = 0


@dataclass
class Scene:
    """A picture, the things in it, one question of every type that makes sense for it, and its drills."""

    family: str
    image: Image.Image
    marks: list[Mark]
    questions: list[Question] = field(default_factory=list)
    drills: list[Drill] = field(default_factory=list)

    def ask(self, rng: Random, type_: str, templates: Sequence[str], answer: str, **slots: object) -> None:
        self.questions.append(Question(type_, rng.choice(templates).format(**slots), answer))

    def drill(self, rng: Random, type_: str, pairs: Sequence[tuple[str, str]], limit: int = 8) -> None:
        """A drill of at most `limit` of the pairs, in random order."""
        if pairs:
            self.drills.append(Drill(type_, tuple(rng.sample(pairs, min(limit, len(pairs))))))


class Canvas:
    """A drawing surface in picture coordinates (0 to SIZE), larger underneath by SUPERSAMPLE."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self._draw = ImageDraw.Draw(image)

    @staticmethod
    def _up(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points]

    def polygon(self, points: Sequence[tuple[float, float]], fill: Rgb, outline: Rgb | None = None) -> None:
        self._draw.polygon(self._up(points), fill=fill, outline=outline, width=SUPERSAMPLE)

    def ellipse(self, box: Box, fill: Rgb, outline: Rgb | None = None) -> None:
        self._draw.ellipse(self._up([box[:2], box[2:]]), fill=fill, outline=outline, width=SUPERSAMPLE)

    def rectangle(self, box: Box, fill: Rgb | None, outline: Rgb | None = None, radius: float = 0) -> None:
        self._draw.rounded_rectangle(
            self._up([box[:2], box[2:]]), radius * SUPERSAMPLE, fill=fill, outline=outline, width=SUPERSAMPLE
        )

    def line(self, points: Sequence[tuple[float, float]], fill: Rgb, width: float = 1) -> None:
        self._draw.line(self._up(points), fill=fill, width=round(width * SUPERSAMPLE))

    def text(self, at: tuple[float, float], text: str, fill: Rgb, font: object) -> None:
        self._draw.text(self._up([at])[0], text, fill=fill, font=font, anchor="mm")  # type: ignore[arg-type]

    def finish(self, rng: Random) -> Image.Image:
        image = self._image.reduce(SUPERSAMPLE)
        return image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.7))) if rng.random() < 0.3 else image


def backdrop(rng: Random) -> Canvas:
    """A plain, shaded, striped or checked background with some clutter on it."""
    side = SIZE * SUPERSAMPLE
    base, other = jitter(rng, rng.choice(BACKDROPS), 18), jitter(rng, rng.choice(BACKDROPS), 18)
    kind = rng.choice(("plain", "shade", "stripes", "checks"))
    if kind == "shade":
        image = Image.new("RGB", (2, 2))
        image.putdata([base, other, base if rng.random() < 0.5 else other, other])
        canvas = Canvas(image.resize((side, side), Image.Resampling.BILINEAR))
    else:
        canvas = Canvas(Image.new("RGB", (side, side), base))
        other = tuple((2 * b + o) // 3 for b, o in zip(base, other, strict=True))  # type: ignore[assignment]
        step = rng.randint(8, 20)
        if kind == "stripes":
            for at in range(0, SIZE, 2 * step):
                box = (at, 0, at + step, SIZE) if step % 2 else (0, at, SIZE, at + step)
                canvas.rectangle(box, other)
        if kind == "checks":
            for i in range(0, SIZE, step):
                for j in range((i // step) % 2 * step, SIZE, 2 * step):
                    canvas.rectangle((i, j, i + step, j + step), other)
    for _ in range(rng.randint(0, 5)):
        color = jitter(rng, rng.choice(BACKDROPS), 30)
        x, y = rng.uniform(0, SIZE), rng.uniform(0, SIZE)
        if rng.random() < 0.5:
            canvas.line([(x, y), (x + rng.uniform(-30, 30), y + rng.uniform(-30, 30))], color)
        else:
            canvas.ellipse((x, y, x + 2.5, y + 2.5), color)
    return canvas


def jitter(rng: Random, color: Rgb, by: int) -> Rgb:
    r, g, b = (min(255, max(0, c + rng.randint(-by, by))) for c in color)
    return (r, g, b)


def paint(rng: Random, name: str) -> Rgb:
    """A shade of the named color."""
    return jitter(rng, COLORS[name], 14)


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def unique(items: Sequence[T], key: Callable[[T], object]) -> list[T]:
    """The items whose key no other item has."""
    keys = [key(item) for item in items]
    return [item for item, k in zip(items, keys, strict=True) if keys.count(k) == 1]
