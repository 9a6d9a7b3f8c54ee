"""Two to seven colored shapes, small or large, each in one of nine places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sin
from random import Random

from checkpoints.world.scene import COLORS, LATTICE, NUMBERS, SIZE, Canvas, Mark, Rgb, Scene, article, backdrop, paint, unique

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
WHATS = SHAPES
TYPES = ("color", "shape", "count_shape", "count_color", "count_all", "exists", "where", "left_right", "above_below",
         "larger", "list", "describe")  # fmt: skip


@dataclass(frozen=True)
class Thing:
    shape: str
    color: str
    large: bool
    place: int  # index into PLACES, reading order

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def size(self) -> str:
        return "large" if self.large else "small"


def draw(rng: Random) -> Scene:
    colors, shapes = list(COLORS), list(SHAPES)
    things = [
        Thing(rng.choice(shapes), rng.choice(colors), rng.random() < 0.5, place)
        for place in sorted(rng.sample(range(9), rng.randint(2, 7)))
    ]
    canvas, marks = backdrop(rng), []
    for thing in things:
        radius = rng.uniform(10, 12) if thing.large else rng.uniform(5.5, 6.5)
        slack = 1 if thing.large else 2
        x = (thing.place % 3 + 0.5) * SIZE / 3 + LATTICE * rng.randint(-slack, slack)
        y = (thing.place // 3 + 0.5) * SIZE / 3 + LATTICE * rng.randint(-slack, slack)
        _draw_shape(canvas, thing.shape, x, y, radius, paint(rng, thing.color), rng.uniform(-0.2, 0.2))
        marks.append(Mark((x - radius, y - radius, x + radius, y + radius), thing.shape, thing.color, 1 + int(thing.large)))
    scene = Scene("shapes", canvas.finish(rng), marks)
    _ask(scene, rng, things)
    _drill(scene, rng, things)
    return scene


def _draw_shape(canvas: Canvas, shape: str, x: float, y: float, r: float, fill: Rgb, turn: float) -> None:
    if shape == "circle":
        canvas.ellipse((x - r, y - r, x + r, y + r), fill)
        return

    def at(angle: float, radius: float) -> tuple[float, float]:
        return x + radius * sin(angle + turn), y - radius * cos(angle + turn)

    if shape == "square":
        points = [at(pi / 4 + i * pi / 2, r * 1.15) for i in range(4)]
    elif shape == "triangle":
        points = [at(i * 2 * pi / 3, r * 1.1) for i in range(3)]
    elif shape == "diamond":
        points = [at(i * pi / 2, r * (1.15 if i % 2 == 0 else 0.7)) for i in range(4)]
    elif shape == "star":
        points = [at(i * pi / 5, r * (1.15 if i % 2 == 0 else 0.45)) for i in range(10)]
    else:  # cross
        arm = 0.32
        corners = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1), (-arm, 1), (-arm, arm),
                   (-1, arm), (-1, -arm), (-arm, -arm)]  # fmt: skip
        c, s = cos(turn), sin(turn)
        points = [(x + r * (u * c - v * s), y + r * (u * s + v * c)) for u, v in corners]
    canvas.polygon(points, fill)


def _ask(scene: Scene, rng: Random, things: list[Thing]) -> None:
    ask = scene.ask
    if lone := unique(things, lambda t: t.shape):
        t = rng.choice(lone)
        ask(rng, "color", ("What color is the {s}?", "What is the color of the {s}?", "Which color does the {s} have?",
                           "What colour is the {s}?", "Tell me the color of the {s}."), t.color, s=t.shape)  # fmt: skip
    if lone := unique(things, lambda t: t.color):
        t = rng.choice(lone)
        ask(rng, "shape", ("What shape is the {c} object?", "What is the shape of the {c} thing?", "What is the {c} object?",
                           "Which shape is {c}?"), t.shape, c=t.color)  # fmt: skip

    present = [t.shape for t in things]
    shape = rng.choice(present) if rng.random() < 0.75 else rng.choice(SHAPES)
    plural = {"cross": "crosses"}.get(shape, shape + "s")
    ask(rng, "count_shape", ("How many {s} are there?", "How many {s} can you see?", "Count the {s}.",
                             "What is the number of {s}?"), NUMBERS[present.count(shape)], s=plural)  # fmt: skip
    colors = [t.color for t in things]
    color = rng.choice(colors) if rng.random() < 0.75 else rng.choice(list(COLORS))
    ask(rng, "count_color", ("How many {c} objects are there?", "How many {c} things can you see?",
                             "Count the {c} objects.", "How many objects are {c}?"), NUMBERS[colors.count(color)], c=color)  # fmt: skip
    ask(rng, "count_all", ("How many objects are there?", "How many objects are there in all?", "Count the objects.",
                           "How many shapes can you see?", "How many things are in the picture?"), NUMBERS[len(things)])  # fmt: skip

    names = [t.name for t in things]
    if rng.random() < 0.5:
        name = rng.choice(names)
    else:  # often a color and a shape that are both there, but not together
        pool = [f"{c} {s}" for c in (colors if rng.random() < 0.5 else COLORS) for s in (present if rng.random() < 0.5 else SHAPES)]
        name = rng.choice([n for n in pool if n not in names] or pool)
    ask(rng, "exists", ("Is there {a}?", "Is there {a} in the picture?", "Can you see {a}?", "Does the picture show {a}?"),
        "yes" if name in names else "no", a=article(name))  # fmt: skip

    lone = unique(things, lambda t: t.name)
    if lone:
        t = rng.choice(lone)
        ask(rng, "where", ("Where is the {n}?", "Where is the {n} in the picture?", "In which part of the picture is the {n}?",
                           "Where can I find the {n}?"), PLACES[t.place], n=t.name)  # fmt: skip
    pairs = [(a, b) for a in lone for b in lone if a.name != b.name]
    for type_, first, second, place in (
        ("left_right", "left", "right", lambda t: t.place % 3),
        ("above_below", "above", "below", lambda t: t.place // 3),
    ):
        if apart := [(a, b) for a, b in pairs if place(a) != place(b)]:
            a, b = rng.choice(apart)
            templates = {
                "left_right": ("Is the {a} to the left or to the right of the {b}?", "Is the {a} left or right of the {b}?",
                               "Does the {a} stand left or right of the {b}?"),
                "above_below": ("Is the {a} above or below the {b}?", "Is the {a} higher or lower than the {b}, above or below?",
                                "Does the {a} stand above or below the {b}?"),
            }[type_]  # fmt: skip
            ask(rng, type_, templates, first if place(a) < place(b) else second, a=a.name, b=b.name)
    if uneven := [(a, b) for a, b in pairs if a.large != b.large]:
        a, b = rng.choice(uneven)
        ask(rng, "larger", ("Which is larger, the {a} or the {b}?", "Which one is bigger, the {a} or the {b}?",
                            "What is larger: the {a} or the {b}?"), (a if a.large else b).name, a=a.name, b=b.name)  # fmt: skip

    ask(rng, "list", ("List the objects.", "Which objects are there?", "List the objects in the picture.",
                      "What objects can you see?"), ", ".join(names))  # fmt: skip
    parts = "; ".join(f"{PLACES[t.place]}, {article(f'{t.size} {t.name}')}" for t in things)
    ask(rng, "describe", ("Describe the picture.", "What is in the picture?", "Describe this image.",
                          "Tell me what you see."), f"The picture shows {NUMBERS[len(things)]} objects: {parts}.")  # fmt: skip


def _drill(scene: Scene, rng: Random, things: list[Thing]) -> None:
    drill = scene.drill
    colors, shapes, names = ([getattr(t, what) for t in things] for what in ("color", "shape", "name"))
    drill(rng, "color", [(t.shape, t.color) for t in unique(things, lambda t: t.shape)])
    drill(rng, "shape", [(t.color, t.shape) for t in unique(things, lambda t: t.color)])
    drill(rng, "count_shape", [(s, NUMBERS[shapes.count(s)]) for s in sorted({*shapes, rng.choice(SHAPES)})])
    drill(rng, "count_color", [(c, NUMBERS[colors.count(c)]) for c in sorted({*colors, rng.choice(list(COLORS))})])
    mixed = {f"{c} {s}" for c in colors for s in SHAPES} | {f"{c} {s}" for c in COLORS for s in shapes}
    absent = sorted(mixed - set(names))
    present = sorted(set(names))
    drill(rng, "exists", [(n, "yes") for n in present] + [(n, "no") for n in rng.sample(absent, len(present))])
    lone = unique(things, lambda t: t.name)
    drill(rng, "where", [(t.name, PLACES[t.place]) for t in lone])
    drill(rng, "size", [(t.name, t.size) for t in lone])
    pairs = [(a, b) for a in lone for b in lone if a is not b]

    def compare(type_: str, less: str, more: str, key: Callable[[Thing], int]) -> None:
        found = [(f"{a.name} {b.name}", less if key(a) < key(b) else more) for a, b in pairs if key(a) != key(b)]
        drill(rng, type_, found, limit=4)

    compare("left_right", "left", "right", lambda t: t.place % 3)
    compare("above_below", "above", "below", lambda t: t.place // 3)
    drill(rng, "larger", [(f"{a.name} {b.name}", (a if a.large else b).name) for a, b in pairs if a.large != b.large], limit=3)
