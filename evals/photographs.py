"""Photographs to be named. To test: the cut-outs of Debian's package `tuxpaint-stamps-default`, on plain and on textured ground. To
tune by: the whole photographs of `gcompris-qt-data`, most of them animals where they live.

Both are fetched when they are asked for, and never shipped or learned from. Each cut-out has a caption; the words that end it are
looked up among the names of the things, and the folder tells its kind. A species that the things do not hold may be called by the
general word that they do hold: bird, fish, flower, mushroom, tree.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from checkpoints.things import SIZE, Question, catalogue, normalize, paint
from checkpoints.things.catalogue import Kind, Thing
from evals.debian import Package
from evals.exam import Item
from evals.qt_resources import read_resources
from evals.things import item
from models.images import decode

STAMPS = Package("tuxpaint-stamps-default", Path("usr/share/tuxpaint/stamps"))
WHOLE = Package("gcompris-qt-data", Path("usr/share/gcompris-qt/rcc"))
LONGEST = 0.8
"""Longer side of a photograph, as a share of the picture's."""
NAME, KIND = "What is this?", "What kind of thing is this?"

# The kind of all that a folder holds and the general word for it, the innermost folder first. Other folders hold few photographs.
_FOLDERS = {
    "animals/birds": ("bird", "bird"), "animals/fish": ("sea animal", "fish"), "animals/insects": ("insect", None),
    "animals/shellfish": ("sea animal", None), "animals": ("animal", None), "food/fruit": ("fruit", None),
    "food/vegetables": ("vegetable", None), "food": ("food", None), "plants/flowers": ("plant", "flower"),
    "plants/trees": ("plant", "tree"), "plants/mushrooms": ("plant", "mushroom"), "plants": ("plant", None),
    "vehicles": ("vehicle", None), "household/tools": ("tool", None), "household": (None, None),
    "hobbies/music": ("musical instrument", None), "hobbies": (None, None), "sports": ("sports equipment", None),
}  # fmt: skip

# By file: names that a caption does not end with, or that it ends with and does not mean. None: the things do not hold it.
_CALLED = {
    "adelaide-rosella": "parrot", "rainbow-lorikeet": "parrot", "drake": "duck", "gander": "goose",
    "albino_peahen": "peacock", "hoverfly": "fly", "hornet": "bee", "iguana": "lizard",
    "chimp": "monkey", "tamarin_emperor": "monkey", "edward_bear": "teddy bear", "zebu": "cow",
    "sheep_lamb": "sheep", "mountaingoat": "goat", "caribou": "deer", "doe": "deer", "wapiti": "deer", "dingo": "dog",
    "wildboar": "boar", "avocado": "avocado", "chilepepper": "chili pepper", "pepper": "bell pepper",
    "yellowpepper": "bell pepper", "garlic": "garlic", "beetle": "car", "balloon360": None, "highlighter": "pen",
    "glass": None, "rubberduck": None, "toilet": "toilet", "drumkit": "drum", "australian_rules_football": None,
    "cricketball": None, "tomato": "tomato", "holly_leaves": "leaf", "trophy_cup": "trophy", "lettuce_bolted": None,
}  # fmt: skip

_NOT_ASKED = {
    "hedgehog", "pizza", "echidna", "sedan_police",  # drawings
    "7spoke256", "wheel_tractor", "pinecone", "rambutan", "Brown_slug", "Woodlouse",  # not of the kind that their folder says
}  # fmt: skip

_WHOLE: dict[str, dict[str, str]] = tomllib.loads(Path(__file__).with_name("photographs.toml").read_text("utf-8"))


@dataclass(frozen=True)
class Photograph:
    """`names` are right answers to what it is, the best first, none if the things do not hold it; `kinds` to what kind of thing it
    is. `general`: it is named by the general word for what its folder holds."""

    path: Path
    names: tuple[str, ...]
    general: bool
    kinds: tuple[str, ...]


def questions(split: str = "test") -> Iterator[tuple[Image.Image, Item]]:
    """What each photograph shows, and what kind of thing that is; of the test on both grounds. In an order that mixes the kinds,
    always the same. Raises ValueError for another split, and where the photographs cannot be had."""
    sources = {"validation": _whole, "test": _cut_outs}
    if split not in sources:
        raise ValueError(f"split {split!r} is not one of {', '.join(sources)}")
    yield from sources[split]()


def _cut_outs() -> Iterator[tuple[Image.Image, Item]]:
    found = photographs(STAMPS.folder())
    Random(STAMPS.name).shuffle(found)
    for photograph in found:
        for ground, draw in GROUNDS.items():
            picture = paste(photograph.path, draw(Random(f"{photograph.path.stem}/{ground}"), SIZE))
            if photograph.names:
                yield picture, _item("general" if photograph.general else "name", ground, NAME, photograph.names)
            if photograph.kinds:
                yield picture, _item("kind", ground, KIND, photograph.kinds)


def _whole() -> Iterator[tuple[Image.Image, Item]]:
    things, folder, found = catalogue.load(), WHOLE.folder(), []
    for resource, names in _WHOLE.items():
        files = {Path(path).name: data for path, data in read_resources(folder / f"{resource}.rcc")}
        found += [(files[f"{file}.webp"], things[name]) for file, name in names.items()]
    Random(WHOLE.name).shuffle(found)
    for data, thing in found:
        picture = decode(data)
        yield picture, _item("name", "whole", NAME, (*thing.names, thing.many))
        yield picture, _item("kind", "whole", KIND, _words(thing.kind))


def _item(family: str, ground: str, text: str, answers: tuple[str, ...]) -> Item:
    return item(family, Question(ground, text, answers[0], answers[1:]))


def _plain(rng: Random, side: int) -> Image.Image:
    return Image.new("RGB", (side, side), paint.any_color(rng))


GROUNDS: dict[str, Callable[[Random, int], Image.Image]] = {"plain": _plain, "textured": paint.textured_ground}


def paste(path: Path, ground: Image.Image) -> Image.Image:
    """A cut-out in the middle of a square ground."""
    with Image.open(path) as image:
        cut = image.convert("RGBA")
    cut = cut.crop(cut.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
    scale = LONGEST * ground.width / max(cut.size)
    cut = cut.resize((max(1, round(cut.width * scale)), max(1, round(cut.height * scale))), Image.Resampling.BICUBIC)
    ground.paste(cut, ((ground.width - cut.width) // 2, (ground.height - cut.height) // 2), cut)
    return ground


def photographs(stamps: Path) -> list[Photograph]:
    """Every photograph whose name or kind the things hold."""
    found = []
    for path in sorted(stamps.rglob("*.png")):
        inside = path.relative_to(stamps).as_posix()
        fits = [folder for folder in _FOLDERS if inside.startswith(f"{folder}/")]
        caption = path.with_suffix(".txt")
        if fits and "cartoon" not in inside and "_mirror" not in path.stem and path.stem not in _NOT_ASKED and caption.exists():
            lines = caption.read_text("utf-8").splitlines()
            found.append(_photograph(path, lines[0] if lines else "", *_FOLDERS[fits[0]]))
    return [photograph for photograph in found if photograph.names or photograph.kinds]


def _photograph(path: Path, caption: str, kind: str | None, general: str | None) -> Photograph:
    things = catalogue.load()
    if path.stem in _CALLED:
        name = _CALLED[path.stem]
        meant = [things[name]] if name else []
    else:
        meant = named(caption, kind)
    is_general = not meant and general is not None
    if not meant and general:
        meant = [things[general]]
    names = [name for thing in meant for name in (*thing.names, thing.many)]
    kinds = {thing.kind.name: thing.kind for thing in things.values()}
    words = [word for one in [*(thing.kind for thing in meant), *([kinds[kind]] if kind else [])] for word in _words(one)]
    return Photograph(
        path,
        names=(*names, _phrase(caption)) if names else (),
        general=is_general,
        kinds=(*words, *([general] if general else [])),
    )


def named(caption: str, kind: str | None) -> list[Thing]:
    """The things of a kind, or of any if it is None, that the last words of a caption name; as many words as can be.

    What is called so comes before what may be called so too.
    """
    words = normalize(_phrase(caption)).split()
    of_kind = [thing for thing in catalogue.load().values() if kind is None or thing.is_a(kind)]
    for first in range(len(words)):
        tail = " ".join(words[first:])
        own = [thing for thing in of_kind if tail == normalize(thing.name)]
        if found := own or [thing for thing in of_kind if tail in map(normalize, (*thing.also, thing.many))]:
            return found
    return []


def _phrase(caption: str) -> str:
    """The first part of a caption: "A peacock (a male peafowl)." is "A peacock"."""
    return re.split(r"[,.(!—?]", caption)[0].strip()


def _words(kind: Kind) -> tuple[str, ...]:
    wider = (kind.wider,) if kind.wider else ()
    return (kind.name, *wider, *kind.also, kind.one, kind.many)
