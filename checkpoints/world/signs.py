"""A plate with one to four digits or capital letters."""

from __future__ import annotations

from functools import cache
from random import Random

from PIL import ImageFont

from checkpoints.world.scene import COLORS, LATTICE, NUMBERS, SIZE, SUPERSAMPLE, Mark, Scene, article, backdrop, paint

PITCH = 20
"""Pixels from one character to the next."""
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
WHATS = (*CHARACTERS, "plate")
TYPES = ("read", "count_characters", "sign_color", "first", "last", "has_digit", "describe")


@cache
def _font(size: int) -> object:
    return ImageFont.load_default(size * SUPERSAMPLE)


def draw(rng: Random) -> Scene:
    text = "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, 4)))
    color = rng.choice(list(COLORS))
    ink = rng.choice(("black", "blue", "red") if color in ("white", "yellow", "orange") else ("white", "yellow"))
    canvas = backdrop(rng)
    size = rng.choice((26, 30))
    width, height = len(text) * PITCH + rng.uniform(4, 8), size + rng.uniform(6, 14)
    first = LATTICE * rng.randint(round(PITCH / 2 / LATTICE + 1), round((SIZE - PITCH * (len(text) - 0.5)) / LATTICE - 1))
    center = first + PITCH * (len(text) - 1) / 2
    middle = 2 * LATTICE * rng.randint(3, 9)
    plate = (center - width / 2, middle - height / 2, center + width / 2, middle + height / 2)
    canvas.rectangle(plate, paint(rng, color), outline=paint(rng, ink), radius=rng.uniform(0, 5))
    marks = [Mark(plate, "plate", color)]
    for i, character in enumerate(text):
        x = first + i * PITCH
        canvas.text((x, middle), character, paint(rng, ink), _font(size))
        marks.append(Mark((x - PITCH / 2, middle - size / 2, x + PITCH / 2, middle + size / 2), character, color, i + 1))
    scene = Scene("signs", canvas.finish(rng), marks)
    _ask(scene, rng, text, color)
    return scene


def _ask(scene: Scene, rng: Random, text: str, color: str) -> None:
    ask = scene.ask
    ask(rng, "read", ("What is written on the sign?", "What does the sign say?", "Read the sign.", "What is written?",
                      "What text is on the plate?"), text)  # fmt: skip
    ask(rng, "count_characters", ("How many characters are on the sign?", "How many characters does the sign have?",
                                  "Count the characters on the sign."), NUMBERS[len(text)])  # fmt: skip
    ask(rng, "sign_color", ("What color is the sign?", "What is the color of the plate?", "What colour is the sign?",
                            "Which color does the sign have?"), color)  # fmt: skip
    ask(rng, "first", ("What is the first character on the sign?", "Which character comes first?",
                       "What does the sign start with?"), text[0])  # fmt: skip
    ask(rng, "last", ("What is the last character on the sign?", "Which character comes last?",
                      "What does the sign end with?"), text[-1])  # fmt: skip
    digit = any(c.isdigit() for c in text)
    ask(rng, "has_digit", ("Is there a digit on the sign?", "Does the sign show a digit?", "Is any character a digit?"),
        "yes" if digit else "no")  # fmt: skip
    ask(rng, "describe", ("Describe the picture.", "What is in the picture?", "Describe this image.",
                          "Tell me what you see."), f"The picture shows {article(color)} sign that says {text}.")  # fmt: skip
