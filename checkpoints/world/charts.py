"""A bar chart of two to five colored bars, one to eight units high."""

from __future__ import annotations

from random import Random

from checkpoints.world.scene import BACKDROPS, COLORS, NUMBERS, SIZE, Mark, Scene, article, backdrop, jitter, paint

TALLEST = 8
WHATS = ("bar",)
TYPES = ("tallest", "shortest", "height", "count_bars", "exists", "taller", "list", "describe")


def draw(rng: Random) -> Scene:
    bars = list(zip(rng.sample(list(COLORS), n := rng.randint(2, 5)), rng.sample(range(1, TALLEST + 1), n), strict=True))
    canvas = backdrop(rng)
    left, right, floor = 8.0, SIZE - 4.0, SIZE - 6.0
    unit = 10.0
    canvas.rectangle((left, floor - TALLEST * unit - 2, right, floor), jitter(rng, rng.choice(BACKDROPS), 10))
    for i in range(TALLEST + 1):
        canvas.line([(left, floor - i * unit), (right, floor - i * unit)], (95, 95, 95), 0.5)
    pitch = (right - left) / n
    width = pitch * rng.uniform(0.5, 0.8)
    marks = []
    for i, (color, height) in enumerate(bars):
        x = left + (i + 0.5) * pitch
        box = (x - width / 2, floor - height * unit, x + width / 2, floor)
        canvas.rectangle(box, paint(rng, color))
        marks.append(Mark(box, "bar", color, height))
    canvas.line([(left, floor - TALLEST * unit - 2), (left, floor), (right, floor)], (40, 40, 40))
    scene = Scene("charts", canvas.finish(rng), marks)
    _ask(scene, rng, bars)
    _drill(scene, rng, bars)
    return scene


def _ask(scene: Scene, rng: Random, bars: list[tuple[str, int]]) -> None:
    ask = scene.ask
    heights = dict(bars)
    ask(rng, "tallest", ("Which bar is the tallest?", "Which bar is tallest?", "What color is the tallest bar?",
                         "Which bar is the highest?"), max(heights, key=heights.__getitem__))  # fmt: skip
    ask(rng, "shortest", ("Which bar is the shortest?", "Which bar is shortest?", "What color is the shortest bar?",
                          "Which bar is the lowest?"), min(heights, key=heights.__getitem__))  # fmt: skip
    color, height = rng.choice(bars)
    ask(rng, "height", ("How tall is the {c} bar?", "What is the height of the {c} bar?", "How high is the {c} bar?",
                        "What value does the {c} bar show?"), NUMBERS[height], c=color)  # fmt: skip
    ask(rng, "count_bars", ("How many bars are there?", "How many bars does the chart have?", "Count the bars."),
        NUMBERS[len(bars)])  # fmt: skip
    color = rng.choice(list(heights) if rng.random() < 0.5 else [c for c in COLORS if c not in heights])
    ask(rng, "exists", ("Is there {a}?", "Is there {a} in the chart?", "Can you see {a}?", "Does the chart show {a}?"),
        "yes" if color in heights else "no", a=article(f"{color} bar"))  # fmt: skip
    a, b = rng.sample(list(heights), 2)
    ask(rng, "taller", ("Is the {a} bar taller than the {b} bar?", "Is the {a} bar higher than the {b} one?"),
        "yes" if heights[a] > heights[b] else "no", a=a, b=b)  # fmt: skip
    ask(rng, "list", ("List the bars.", "Which bars are there?", "List the bars and their heights.",
                      "What are the values of the bars?"), ", ".join(f"{c} {NUMBERS[h]}" for c, h in bars))  # fmt: skip
    parts = "; ".join(f"{article(c)} bar of height {NUMBERS[h]}" for c, h in bars)
    ask(rng, "describe", ("Describe the picture.", "What is in the picture?", "Describe this image.",
                          "Tell me what you see."), f"The chart shows {NUMBERS[len(bars)]} bars: {parts}.")  # fmt: skip


def _drill(scene: Scene, rng: Random, bars: list[tuple[str, int]]) -> None:
    heights = dict(bars)
    scene.drill(rng, "height", [(c, NUMBERS[h]) for c, h in bars])
    scene.drill(rng, "exists", [(c, "yes" if c in heights else "no") for c in COLORS])
    pairs = [(f"{a} {b}", "yes" if heights[a] > heights[b] else "no") for a in heights for b in heights if a != b]
    scene.drill(rng, "taller", pairs)
