"""Bar charts, upright or lying, and pies."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from checkpoints.things import fonts, paint
from checkpoints.things.catalogue import article
from checkpoints.things.paint import ALSO, COLORS
from checkpoints.things.scene import NUMBERS, Asker, Mark, Scene, count

TALLEST = 10


def draw(rng: Random, hands: tuple[str, ...], side: int, paraphrase: str, strong: bool) -> Scene:
    return (_draw_pie if rng.random() < 0.2 else _draw_bars)(rng, side, paraphrase, strong)


def _paper(rng: Random, side: int, colors: list[str]) -> tuple[Image.Image, paint.Rgb]:
    """A ground, and the color of a panel on it that none of the colors is lost on."""
    canvas, _ = paint.ground(rng, side)
    panel = paint.any_color(rng)
    while any(paint.distance(panel, COLORS[c]) < 60 for c in colors):
        panel = paint.any_color(rng)
    return canvas, panel


def _draw_bars(rng: Random, side: int, paraphrase: str, strong: bool) -> Scene:
    n = rng.randint(2, 6)
    most = rng.choice((8, 8, TALLEST))
    bars = list(zip(rng.sample(list(COLORS), n), rng.sample(range(1, most + 1), n), strict=True))
    canvas, panel = _paper(rng, side, [c for c, _ in bars])
    pen = ImageDraw.Draw(canvas)
    x0, x1 = rng.uniform(0.04, 0.2) * side, rng.uniform(0.82, 0.98) * side
    y0, y1 = rng.uniform(0.03, 0.2) * side, rng.uniform(0.8, 0.95) * side
    lying = rng.random() < 0.2
    numbered = rng.random() < 0.6
    line = paint.contrast(rng, panel)
    soft = tuple((a + 2 * b) // 3 for a, b in zip(line, panel, strict=True))
    pen.rectangle((x0, y0, x1, y1), panel)
    top = most + rng.choice((0, 0.3, 1))
    unit = ((x1 - x0) if lying else (y1 - y0)) / top
    font = fonts.at_size(fonts.pick(rng, unseen=not strong), min(22, unit * 0.7))
    thin, thick = rng.randint(1, 2), rng.randint(2, 4)
    for i in range(int(top) + 1):
        spot = x0 + i * unit if lying else y1 - i * unit
        pen.line((spot, y0, spot, y1) if lying else (x0, spot, x1, spot), soft, thin)
        if numbered:
            where, anchor = ((spot, y1 + 3), "ma") if lying else ((x0 - 4, spot), "rm")
            back = paint.mean(canvas, (max(0, where[0] - 10), max(0, where[1] - 10), where[0] + 1, where[1] + 1))
            pen.text(where, str(i), paint.contrast(rng, (int(back[0]), int(back[1]), int(back[2]))), font, anchor=anchor)
    pitch = ((y1 - y0) if lying else (x1 - x0)) / n
    width = pitch * rng.uniform(0.4, 0.85)
    outline = line if rng.random() < 0.3 else None
    marks = []
    for i, (color, height) in enumerate(bars):
        middle = (y0 if lying else x0) + (i + 0.5) * pitch
        if lying:
            box = (x0, middle - width / 2, x0 + height * unit, middle + width / 2)
        else:
            box = (middle - width / 2, y1 - height * unit, middle + width / 2, y1)
        pen.rectangle(box, paint.jitter(rng, COLORS[color], 12), outline, 2)
        marks.append(Mark((box[0] / side, box[1] / side, box[2] / side, box[3] / side), f"{color} bar", "bar"))
    pen.line([(x0, y0), (x0, y1), (x1, y1)], line, thick)
    if strong and rng.random() < 0.15:
        canvas = paint.coarsen(rng, canvas, rng.choice((96, 160, 224, 320)))
    asker = Asker(rng, paraphrase)
    _ask_bars(asker, bars, lying)
    return Scene("charts", paint.shoot(rng, canvas, strong=strong), marks, asker.questions)


def _ask_bars(asker: Asker, bars: list[tuple[str, int]], lying: bool) -> None:
    ask, rng = asker.ask, asker.rng
    heights = dict(bars)

    def named(type_: str, color: str) -> None:
        ask(type_, color, also=(*ALSO.get(color, ()), f"{color} bar"), wording=f"{type_}_lying" if lying else None,
            sentence=f"The {color} bar is the {'longest' if lying else 'tallest'}." if type_ == "tallest" else None)  # fmt: skip

    ask("what", "bar chart", also=("chart", "bar graph", "graph", "diagram"), sentence="It is a bar chart.")
    named("tallest", max(heights, key=heights.__getitem__))
    named("shortest", min(heights, key=heights.__getitem__))
    color, height = rng.choice(bars)
    ask("height", **count(height), c=color, wording="height_lying" if lying else None)
    value, color = rng.choice([(h, c) for c, h in bars])
    ask("which_height", color, also=(*ALSO.get(color, ()), f"{color} bar"), n=rng.choice((NUMBERS[value], str(value))))
    ask("count", **count(len(bars)), many="bars")
    color = rng.choice(list(heights) if rng.random() < 0.5 else [c for c in COLORS if c not in heights])
    ask("exists", "yes" if color in heights else "no", one=article(f"{color} bar"), many=f"{color} bars")
    a, b = rng.sample(list(heights), 2)
    ask("taller", "yes" if heights[a] > heights[b] else "no", a=a, b=b, wording="taller_lying" if lying else None)
    ask(
        "list",
        ", ".join(f"{c} {NUMBERS[h]}" for c, h in bars),
        wording="list_bars",
        parts=[(f"{c} {NUMBERS[h]}",) for c, h in bars],
    )
    told = "; ".join(f"{article(c)} bar of {'length' if lying else 'height'} {NUMBERS[h]}" for c, h in bars)
    ask("describe", f"The chart shows {NUMBERS[len(bars)]} bars: {told}.", parts=[(c,) for c, _ in bars])


def _draw_pie(rng: Random, side: int, paraphrase: str, strong: bool) -> Scene:
    n = rng.randint(2, 5)
    while True:
        weights = [rng.uniform(1, 5) for _ in range(n)]
        ordered = sorted(weights)
        if ordered[-1] > 1.3 * ordered[-2] and (n == 2 or ordered[1] > 1.25 * ordered[0]):
            break
    colors = rng.sample(list(COLORS), n)
    canvas, _ = paint.ground(rng, side)
    radius = rng.uniform(0.2, 0.46) * side
    x, y = (rng.uniform(radius, side - radius) for _ in range(2))
    up = 2
    tile = Image.new("RGBA", (round(2 * radius * up) + 2, round(2 * radius * up) + 2), (0, 0, 0, 0))
    pen = ImageDraw.Draw(tile)
    box = (0, 0, 2 * radius * up, 2 * radius * up)
    line = rng.choice(((255, 255, 255), (20, 20, 20)))
    start = rng.uniform(0, 360)
    for color, weight in zip(colors, weights, strict=True):
        sweep = 360 * weight / sum(weights)
        pen.pieslice(box, start, start + sweep, paint.jitter(rng, COLORS[color], 12), line, rng.randint(2, 6))
        start += sweep
    paint.place(rng, canvas, tile.reduce(up), round(x - radius), round(y - radius))
    asker = Asker(rng, paraphrase)
    ask = asker.ask
    ask("what", "pie chart", also=("chart", "pie", "graph", "diagram"), sentence="It is a pie chart.")
    by = dict(zip(colors, weights, strict=True))
    for type_, color in (("slice_largest", max(by, key=by.__getitem__)), ("slice_smallest", min(by, key=by.__getitem__))):
        ask(type_, color, also=(*ALSO.get(color, ()), f"{color} slice"))
    ask("count", **count(n), many=rng.choice(("slices", "parts")))
    color = rng.choice(colors if rng.random() < 0.5 else [c for c in COLORS if c not in colors])
    ask("exists", "yes" if color in colors else "no", one=article(f"{color} slice"), many=f"{color} slices")
    ask("describe", f"The picture shows a pie chart of {NUMBERS[n]} slices: {', '.join(colors[:-1])} and {colors[-1]}.",
        parts=[(c,) for c in colors])  # fmt: skip
    shares = ((x - radius) / side, (y - radius) / side, (x + radius) / side, (y + radius) / side)
    return Scene("charts", paint.shoot(rng, canvas, strong=strong), [Mark(shares, "pie chart", "chart")], asker.questions)
