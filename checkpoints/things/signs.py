"""Signs with words, codes, prices and times on them: one, or two of different colors."""

from __future__ import annotations

from random import Random

from PIL import Image, ImageDraw

from checkpoints.things import catalogue, fonts, paint
from checkpoints.things.catalogue import article
from checkpoints.things.paint import ALSO, COLORS
from checkpoints.things.scene import Asker, Box, Mark, Scene, count

WORDS = """stop exit open closed sale welcome danger warning caution push pull enter wait slow school hospital hotel market bakery
cafe bank park bus taxi police library museum station beach garden office menu lunch dinner coffee tea pizza fresh bread
fish fruit milk free new hot cold left right up down start finish north south east west keep out quiet please no parking smoking
entry dogs allowed wet floor do not disturb private road ahead one way men women room toilet press here ring bell play game over
good morning night thank you happy birthday hello world love peace today tomorrow monday friday spring summer winter red blue green
water fire music books shoes toys flowers repair tickets information lost found ice cream big small best price offer only cash
fast train airport city center house rent sold hands wash help wanted mind the gap""".split()
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _text(rng: Random) -> str:
    """One to three lines, each a word or a few, a code, a number, a price or a time."""
    dice = rng.random()
    if dice < 0.25:
        return "".join(rng.choice(CHARACTERS) for _ in range(rng.randint(1, 5)))
    if dice < 0.32:
        return str(rng.randint(0, 10 ** rng.randint(1, 4) - 1))
    if dice < 0.37:
        return f"${rng.randint(1, 99)}" if rng.random() < 0.5 else f"${rng.randint(0, 20)}.{rng.randint(0, 99):02}"
    if dice < 0.41:
        return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02}"
    text = " ".join(
        rng.choice(WORDS if rng.random() < 0.7 else list(catalogue.load())) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))
    )
    if dice < 0.47:
        text = f"{text} {rng.randint(1, 99)}"
    return rng.choice((str.upper, str.upper, str.title, str.lower, str.capitalize))(text)


def draw(rng: Random, hands: tuple[str, ...], side: int, paraphrase: str, strong: bool) -> Scene:
    canvas, _ = paint.ground(rng, side)
    n = 1 if rng.random() < 0.75 else 2
    colors = rng.sample(list(COLORS), n)
    signs = [(_text(rng), color) for color in colors]
    rows = [(0.0, 1.0)] if n == 1 else [(0.02, 0.49), (0.51, 0.98)]
    marks, inks = [], []
    for (text, color), (top, bottom) in zip(signs, rows, strict=True):
        box, ink = _put(rng, canvas, text, color, top, bottom, unseen=not strong)
        marks.append(Mark(box, text, "sign"))
        inks.append(ink)
    if strong and rng.random() < 0.12:
        canvas = paint.coarsen(rng, canvas, rng.choice((192, 256, 320)))
    asker = Asker(rng, paraphrase)
    _ask(asker, signs, inks)
    return Scene("text", paint.shoot(rng, canvas, strong=strong), marks, asker.questions)


def _put(rng: Random, canvas: Image.Image, text: str, color: str, top: float, bottom: float, *, unseen: bool) -> tuple[Box, str]:
    """Draw a sign between two heights, shares of the side; its box and the name of the color of its letters."""
    side = canvas.width
    face = fonts.pick(rng, unseen=unseen)
    lines = _wrap(rng, text)
    width = rng.uniform(0.35, 0.92) * side
    tallest = (bottom - top) * side * rng.uniform(0.15, 0.6) / len(lines)
    font = min((fonts.to_width(face, line, width, tallest) for line in lines), key=lambda f: f.size)
    pitch = font.size * rng.uniform(1.05, 1.3)
    inner = max(font.getlength(line) for line in lines), pitch * len(lines)
    pad = font.size * rng.uniform(0.2, 0.7)
    size = min(side - 4, round(inner[0] + 2 * pad)), min(round((bottom - top) * side) - 2, round(inner[1] + 2 * pad))
    fill = paint.jitter(rng, COLORS[color], 14)
    legible = [name for name in COLORS if abs(paint.luma(COLORS[name]) - paint.luma(COLORS[color])) > 75]
    ink = rng.choice([name for name in ("black", "white") if name in legible] if rng.random() < 0.6 else legible)
    tile = Image.new("RGBA", size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(tile)
    radius = rng.choice((0, 0, 0.1, 0.3)) * min(size)
    rim = paint.jitter(rng, COLORS[ink], 10) if rng.random() < 0.5 else None
    pen.rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), radius, (*fill, 255), rim, rng.randint(2, 6))
    for i, line in enumerate(lines):
        spot = size[0] / 2, size[1] / 2 + (i - (len(lines) - 1) / 2) * pitch
        pen.text(spot, line, paint.jitter(rng, COLORS[ink], 14), font, anchor="mm")
    if rng.random() < 0.4:
        tile = tile.rotate(rng.uniform(-9, 9), Image.Resampling.BICUBIC, expand=True)
        tile = tile.crop((max(0, (tile.width - side) // 2), 0, min(tile.width, (tile.width + side) // 2), tile.height))
    left = rng.randint(0, max(0, side - tile.width))
    room = (round(top * side), max(round(top * side), round(bottom * side) - tile.height))
    high = rng.randint(*room)
    paint.place(rng, canvas, tile, left, high)
    return (left / side, high / side, (left + tile.width) / side, (high + tile.height) / side), ink


def _wrap(rng: Random, text: str) -> list[str]:
    words = text.split()
    if len(words) > 1 and rng.random() < 0.6:
        cut = rng.randint(1, len(words) - 1)
        return [" ".join(words[:cut]), " ".join(words[cut:])]
    return [text]


def _ask(asker: Asker, signs: list[tuple[str, str]], inks: list[str]) -> None:
    ask, rng = asker.ask, asker.rng
    which = rng.randrange(len(signs))
    (text, color), ink, two = signs[which], inks[which], len(signs) == 2
    the = f"the {color} sign" if two else "the sign"
    ask("read", text, sentence=f'It says "{text}".', the=the, pointed=two)
    ask("text_color", ink, also=ALSO.get(ink, ()), the=the)
    if two:
        ask("count", **count(2), many="signs")
        ask("sign_color", color, also=ALSO.get(color, ()), the=f'the sign that says "{text}"', pointed=True)
    else:
        ask("sign_color", color, also=ALSO.get(color, ()), sentence=f"The sign is {color}.", the=the)
        also = ("plate", f"{color} sign", "text", text, f"sign that says {text}", f"{color} sign that says {text}")
        ask("what", "sign", also=also, sentence=f'It is a sign that says "{text}".')
    words = text.split()
    ask("count", **count(len(words)), many="words", wording="count_on", the=the)
    if len(words) == 1 and text.isalnum() and len(text) <= 8:
        many = "letters" if text.isalpha() and rng.random() < 0.3 else "characters"
        ask("count", **count(len(text)), many=many, wording="count_on", the=the)
    if text[0].isalnum() and text[-1].isalnum():
        ask("first", text[0], what="letter" if text[0].isalpha() and rng.random() < 0.5 else "character", the=the, pointed=two)
        ask("last", text[-1], what="letter" if text[-1].isalpha() and rng.random() < 0.5 else "character", the=the, pointed=two)
    ask("has_digit", "yes" if any(c.isdigit() for c in text) else "no", the=the, pointed=two)
    yes = rng.random() < 0.5
    word = rng.choice(words) if yes else rng.choice([w for w in WORDS if w not in text.lower()])
    ask("says", "yes" if yes else "no", word=word if yes else _cased(word, text), the=the)
    parts = [f'{article(c)} sign that says "{t}"' for t, c in signs]
    ask("describe", f"The picture shows {' and '.join(parts)}.", parts=[(t,) for t, _ in signs])


def _cased(word: str, text: str) -> str:
    return word.upper() if text.isupper() else word.title() if text.istitle() else word
