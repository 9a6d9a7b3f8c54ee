"""Plain shapes, freely placed: one on a small picture, or several that differ in shape, color and size."""

from __future__ import annotations

from collections import Counter
from math import cos, pi, sin
from random import Random

from PIL import Image, ImageDraw

from checkpoints.things import paint
from checkpoints.things.catalogue import article, plural
from checkpoints.things.paint import ALSO, COLORS, Rgb
from checkpoints.things.scene import NUMBERS, Asker, Box, Mark, Scene, at, count
from checkpoints.things.things import ask_pairs, join, layout, places, spoken_place

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "rectangle", "oval", "pentagon", "hexagon", "heart")
SIMPLE = ("circle", "rectangle", "triangle")
NEAR = {"square": {"rectangle", "diamond"}, "rectangle": {"square"}, "circle": {"oval"}, "oval": {"circle"},
        "diamond": {"square"}, "pentagon": {"hexagon"}, "hexagon": {"pentagon"}}  # fmt: skip
"""Shapes that some would call by another's name; nobody is asked whether there is none of those."""
ALSO_SHAPE = {"square": ("rectangle",), "oval": ("ellipse",), "diamond": ("rhombus",), "cross": ("plus",),
              "circle": ("dot", "disk"), "rectangle": ("box",)}  # fmt: skip


def _points(rng: Random, shape: str, turn: float) -> list[tuple[float, float]]:
    """The corners of a shape about the origin, none further than 1 from it."""

    def ring(n: int, inner: float = 1.0, phase: float = 0.0) -> list[tuple[float, float]]:
        radii = [1.0, inner]
        return [(radii[i % 2] * sin(phase + i * 2 * pi / n), -radii[i % 2] * cos(phase + i * 2 * pi / n)) for i in range(n)]

    if shape == "square":
        points = ring(4, phase=pi / 4)
    elif shape == "rectangle":
        a = rng.uniform(0.35, 0.6)
        points = [(1, a), (1, -a), (-1, -a), (-1, a)]
        if rng.random() < 0.4:
            points = [(y, x) for x, y in points]
    elif shape == "triangle":
        points = ring(3) if rng.random() < 0.7 else [(rng.uniform(-0.9, 0.9), -0.9), (0.95, 0.8), (-0.95, 0.8)]
    elif shape == "diamond":
        points = ring(4, inner=rng.uniform(0.55, 0.8))
    elif shape == "star":
        points = ring(10, inner=rng.uniform(0.36, 0.5))
    elif shape == "pentagon":
        points = ring(5)
    elif shape == "hexagon":
        points = ring(6, phase=rng.choice((0, pi / 6)))
    elif shape == "heart":
        turns = [i * pi / 24 for i in range(48)]
        points = [(sin(t) ** 3, -(13 * cos(t) - 5 * cos(2 * t) - 2 * cos(3 * t) - cos(4 * t)) / 16) for t in turns]
    elif shape == "cross":
        a = rng.uniform(0.22, 0.36)
        points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    else:  # circle, oval
        b = 1.0 if shape == "circle" else rng.uniform(0.5, 0.68)
        points = [(cos(t), b * sin(t)) for t in (i * pi / 30 for i in range(60))]
    c, s = cos(turn), sin(turn)
    return [(x * c - y * s, x * s + y * c) for x, y in points]


def put(rng: Random, canvas: Image.Image, shape: str, color: str, center: tuple[float, float], longest: float) -> Mark:
    """Draw a shape; center and longest side as shares of the canvas's side. It gets an outline where its color would be lost."""
    side = canvas.width
    points = _points(rng, shape, rng.uniform(-0.2, 0.2) if rng.random() < 0.6 else 0.0)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    scale = longest * side / max(max(xs) - min(xs), max(ys) - min(ys))
    middle = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    width, height = (max(xs) - min(xs)) * scale, (max(ys) - min(ys)) * scale
    left, top = center[0] * side - width / 2, center[1] * side - height / 2
    box = (left, top, left + width, top + height)
    fill = paint.jitter(rng, COLORS[color], 14)
    lost = paint.distance(paint.mean(canvas, box), COLORS[color]) < 110
    outline = paint.contrast(rng, fill) if lost or rng.random() < 0.25 else None
    corners = [((x - middle[0]) * scale + width / 2, (y - middle[1]) * scale + height / 2) for x, y in points]
    _fill(rng, canvas, corners, box, fill, outline)
    return Mark((box[0] / side, box[1] / side, box[2] / side, box[3] / side), f"{color} {shape}", "shape")


def _fill(rng: Random, canvas: Image.Image, points: list[tuple[float, float]], box: Box, fill: Rgb, outline: Rgb | None) -> None:
    """Draw a polygon, smooth at its edges; its corners are in pixels from the box's, flat or a little shaded."""
    pad, up = 4, 3
    size = round(box[2] - box[0]) + 2 * pad, round(box[3] - box[1]) + 2 * pad
    mask = Image.new("L", (size[0] * up, size[1] * up))
    corners = [((x + pad) * up, (y + pad) * up) for x, y in points]
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    mask = mask.reduce(up)
    tile = Image.new("RGB", size, fill)
    if outline:
        rim = [(x / up, y / up) for x, y in [*corners, corners[0]]]
        ImageDraw.Draw(tile).line(rim, outline, 2 * rng.randint(1, 3), joint="curve")
    elif rng.random() < 0.15:  # shaded, not flat
        light = Image.linear_gradient("L").resize(size).point(lambda v: 200 + v * 55 // 255)
        tile = Image.composite(tile, Image.new("RGB", size, (0, 0, 0)), light)
    tile.putalpha(mask)
    paint.place(rng, canvas, tile, round(box[0]) - pad, round(box[1]) - pad)


def draw(rng: Random, hands: tuple[str, ...], side: int, paraphrase: str, strong: bool) -> Scene:
    """One simple shape on a small picture, or one to eight of any shapes."""
    return _draw_simple(rng, side, paraphrase) if rng.random() < 0.35 else _draw_several(rng, side, paraphrase, strong)


def _draw_simple(rng: Random, side: int, paraphrase: str) -> Scene:
    shape, color = rng.choice(SIMPLE), rng.choice(list(COLORS))
    pixels = rng.choice((64, 64, 64, 96, 128, 224))
    base = paint.any_color(rng) if rng.random() < 0.5 else paint.jitter(rng, (245, 245, 245), 10)
    while paint.distance(base, COLORS[color]) < 70:
        base = paint.any_color(rng)
    small = Image.new("RGB", (pixels, pixels), base)
    width, height = (rng.uniform(0.15, 0.85) * pixels for _ in range(2))
    if shape == "circle":
        height = width
    left, top = rng.uniform(0, pixels - width), rng.uniform(0, pixels - height)
    box = (left, top, left + width, top + height)
    fill, pen = paint.jitter(rng, COLORS[color], 14), ImageDraw.Draw(small)
    if shape == "circle":
        pen.ellipse(box, fill)
    elif shape == "rectangle":
        pen.rectangle(box, fill)
    else:
        pen.polygon(_triangle(rng, box), fill)
    image = small.resize((side, side), rng.choice((Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.NEAREST)))
    shares = (box[0] / pixels, box[1] / pixels, box[2] / pixels, box[3] / pixels)
    mark = Mark(shares, f"{color} {shape}", "shape")
    asker = Asker(rng, paraphrase)
    _ask_lone(asker, shape, color, SIMPLE)
    _ask_exists(asker, [(shape, color)], SIMPLE)
    _ask_exists(asker, [(shape, color)], SIMPLE)
    return Scene("shapes", image, [mark], asker.questions)


def _triangle(rng: Random, box: tuple[float, ...]) -> list[tuple[float, float]]:
    x0, y0, x1, y1 = box
    if rng.random() < 0.5:
        return [(rng.uniform(x0, x1), y0), (x1, y1), (x0, y1)]
    return [(x0, rng.uniform(y0, y1)), (x1, y0), (rng.uniform(x0, x1), y1)]


def _draw_several(rng: Random, side: int, paraphrase: str, strong: bool) -> Scene:
    n = rng.choices(range(1, 9), (2, 3, 4, 4, 4, 3, 2, 2))[0]
    canvas, _ = paint.ground(rng, side)
    shapes, colors = rng.sample(SHAPES, rng.randint(2, 6)), rng.sample(list(COLORS), rng.randint(2, 6))
    if rng.random() < 0.3:
        shapes, colors = list(SHAPES), list(COLORS)
    shown = [(rng.choice(shapes), rng.choice(colors)) for _ in range(n)]
    if rng.random() < 0.3:  # two sizes that are told apart at a glance, instead of any
        sizes = rng.uniform(0.1, 0.13), rng.uniform(0.2, 0.24)
        spots = layout(rng, n, lambda: rng.choice(sizes))
    else:
        largest = {1: 0.7, 2: 0.5, 3: 0.4}.get(n, 0.3)
        spots = layout(rng, n, lambda: rng.uniform(0.08, largest))
    marks = [put(rng, canvas, s, c, (x, y), longest) for (s, c), (x, y, longest) in zip(shown, spots, strict=True)]
    marks.sort(key=lambda m: (round(m.center[1] * 3 - 0.5), m.center[0]))
    if strong and rng.random() < 0.2:
        canvas = paint.coarsen(rng, canvas, rng.choice((96, 128, 160, 224)))
    asker = Asker(rng, paraphrase)
    _ask(asker, marks)
    return Scene("shapes", paint.shoot(rng, canvas, strong=strong), marks, asker.questions)


def _split(mark: Mark) -> tuple[str, str]:
    color, shape = mark.name.split()
    return shape, color


def _ask_lone(asker: Asker, shape: str, color: str, known: tuple[str, ...]) -> None:
    ask = asker.ask
    also = ALSO_SHAPE.get(shape, ()) if known != SIMPLE else ("square",) if shape == "rectangle" else ()
    name = f"{color} {shape}"
    ask("what", name, also=(shape, article(name), *also), sentence=f"It is {article(name)}.")
    ask("which_shape", shape, also=also, sentence=f"It is {article(shape)}.")
    ask("lone_color", color, also=ALSO.get(color, ()), sentence=f"The {shape} is {color}.")
    ask("color", color, also=ALSO.get(color, ()), sentence=f"The {shape} is {color}.", the=f"the {shape}")
    ask("describe", f"The picture shows {article(name)}.", parts=[(name,)])


def _ask_exists(asker: Asker, shown: list[tuple[str, str]], known: tuple[str, ...]) -> None:
    """Whether there is a shape, a color, or both together; sometimes whether there is not."""
    rng = asker.rng
    shapes, colors = {s for s, _ in shown}, {c for _, c in shown}
    near = {s for shape in shapes for s in NEAR.get(shape, set())} if known != SIMPLE else set()
    yes = rng.random() < 0.5
    absent_shapes, absent_colors = [s for s in known if s not in shapes | near], [c for c in COLORS if c not in colors]
    what = rng.choice(("shape", "color", "both"))
    if what == "shape" and absent_shapes:
        noun = rng.choice(sorted(shapes)) if yes else rng.choice(absent_shapes)
    elif what == "color":
        noun = f"{rng.choice(sorted(colors) if yes else absent_colors)} {rng.choice(('shape', 'shape', 'object', 'thing'))}"
    else:  # half of the absent pairs are made of a shape and a color that are both there, so that the pair must be seen
        some_shapes = sorted(shapes) if rng.random() < 0.5 else absent_shapes or sorted(shapes)
        some_colors = sorted(colors) if rng.random() < 0.5 else list(COLORS)
        mixed = [(s, c) for s in some_shapes for c in some_colors]
        absent = [(s, c) for s, c in mixed if not any(c == d and (s == t or s in NEAR.get(t, ())) for t, d in shown)]
        if not yes and not absent:
            yes = True
        shape, color = rng.choice(shown if yes else absent)
        noun = f"{color} {shape}"
    one, many = article(noun), plural(noun)
    if rng.random() < 0.3:
        asker.ask("exists_not", "no" if yes else "yes", noun=noun, one=one)
    else:
        asker.ask("exists", "yes" if yes else "no", wording=rng.choice(("exists", "exists_shape")), one=one, many=many, noun=noun)


def _ask(asker: Asker, marks: list[Mark]) -> None:
    ask, rng = asker.ask, asker.rng
    shown = [_split(m) for m in marks]
    shapes, colors = Counter(s for s, _ in shown), Counter(c for _, c in shown)
    names = Counter(m.name for m in marks)
    if len(marks) == 1:
        _ask_lone(asker, *shown[0], SHAPES)
    if lone := [(s, c) for s, c in shown if shapes[s] == 1]:
        s, c = rng.choice(lone)
        ask("color", c, also=ALSO.get(c, ()), sentence=f"The {s} is {c}.", the=f"the {s}")
    if lone := [(s, c) for s, c in shown if colors[c] == 1]:
        s, c = rng.choice(lone)
        noun = f"{c} {rng.choice(('object', 'thing'))}"
        ask("shape", s, also=(*ALSO_SHAPE.get(s, ()), f"{c} {s}"), sentence=f"It is {article(s)}.", noun=noun)
    shape = rng.choice(list(shapes)) if rng.random() < 0.75 else rng.choice(SHAPES)
    if not NEAR.get(shape, set()) & shapes.keys():
        ask("count", **count(shapes[shape]), many=plural(shape))
    color = rng.choice(list(colors)) if rng.random() < 0.75 else rng.choice(list(COLORS))
    ask("count", **count(colors[color]), many=f"{color} {rng.choice(('objects', 'things', 'shapes'))}")
    ask("count_all", **count(len(marks)))
    _ask_exists(asker, shown, SHAPES)
    alone = [m for m in marks if names[m.name] == 1]
    if alone:
        m = rng.choice(alone)
        where = places(m.center)
        ask("where", where[0], also=spoken_place(where), sentence=f"The {m.name} is {at(where[0])}.", the=f"the {m.name}")
    ask_pairs(asker, alone)
    parts = [(name, plural(name)) for name in names]
    ask("list", ", ".join(f"{NUMBERS[k]} {plural(n)}" if k > 1 else n for n, k in names.items()), parts=parts)
    if len(marks) > 1:
        told = join([f"{article(m.name)} {at(places(m.center)[0])}" for m in marks])
        ask("describe", f"The picture shows {NUMBERS[len(marks)]} shapes: {told}.", parts=parts)
