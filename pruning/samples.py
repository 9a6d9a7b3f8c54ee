"""Samples for calibration and training: pictures and what is asked about them, from a JSONL file or drawn on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from random import Random

from PIL import Image

from checkpoints import things, world
from models.checkpoint import sha256
from models.images import ImageError, decode
from models.manifest import read_manifest

WORLD, THINGS = "world", "things"
"""Data that is drawn: what `embedded` was trained on, and what `smol` was; the latter's drawings are fetched when first needed."""
FAMILIES = {WORLD: world.FAMILIES, THINGS: things.FAMILIES}
"""The families of those drawings."""
UNSEEN = 100_000_000
"""Scenes of things from this number on are like those that `smol` was trained on, and were not among them."""


class DataError(ValueError):
    """The data cannot be used; the message names the line and what to do."""


@dataclass(frozen=True)
class Sample:
    """An RGB picture, and the turns about it: (question, answer), each a question of its own."""

    image: Image.Image
    turns: list[tuple[str, str]]


def choose(data: str | None, checkpoint: Path) -> str:
    """The data that a run on a checkpoint is to use: what was asked for, or else the shipped data that it was trained on.

    Raises DataError where there is neither, since what is measured on other pictures than a model knows misleads, and for a file
    that does not exist.
    """
    data = data or read_manifest(checkpoint).trained_on
    if not data:
        raise DataError(
            f"{checkpoint} needs --data FILE, a JSONL file of pictures like those that it will see, and questions about them; "
            f"--data {WORLD} or {THINGS} takes the drawings that `embedded` and `smol` were trained on"
        )
    if data not in FAMILIES and not Path(data).is_file():
        raise DataError(f"data: {data} is not a file; name a JSONL file, `{WORLD}` or `{THINGS}`")
    return data


def content(data: str) -> str:
    """What tells two states of the same file apart; empty for what is drawn, which never changes."""
    return "" if data in FAMILIES else sha256(Path(data))


def read(data: str, count: int, seed: int, *, answered: bool = True, families: Sequence[str] = ()) -> Iterator[Sample]:
    """`count` samples: drawn scenes, or pictures of a JSONL file in a random order without repetition, each with the turns of all
    its lines. Fewer by the same seed are the first of them.

    A line is {"image", "question", "answer"} or LLaVA's own {"image", "conversations": [{"from": "human", "value"}, {"from": "gpt",
    "value"}, ...]}; image paths are relative to the file. Unless `answered`, answers are not read. `families` of drawn scenes take
    turns, all of them if none is named. Raises DataError for a line that cannot be read, for a picture that is not there, and for
    too few of them before it returns; for a broken picture when its turn comes.
    """
    if data in FAMILIES:
        return _drawn(data, count, seed * 1_000_000, tuple(families))
    path = Path(data)
    pictures = _pictures(path, answered)
    if len(pictures) < count:
        raise DataError(f"{path} has {len(pictures)} pictures and {count} are asked for; add some, or ask for fewer")
    return _opened(path, _in_order(pictures, seed)[:count])


def check(data: str, count: int, seed: int, *, answered: bool = True) -> None:
    """Raise the DataErrors that `read` raises before it returns: for runs that read late, to be told at once."""
    read(data, count, seed, answered=answered)


def read_rest(
    data: str, count: int, used: int, seed: int, families: Sequence[str] = (), earlier: Sequence[tuple[int, int]] = ()
) -> list[Sample]:
    """Up to `count` samples, without answers, that are not among the `used` ones that `read` gives, nor among those of `earlier`
    runs, (count, seed) each: fewer, or none, where a file ends. Raises DataError as `read` does."""
    runs = [(used, seed), *earlier]
    if data in FAMILIES:
        past = max(number for number, by in runs if by == seed)
        return list(_drawn(data, count, seed * 1_000_000 + past, tuple(families)))
    pictures = _pictures(Path(data), answered=False)
    taken = {one.image for number, by in runs for one in _in_order(pictures, by)[:number]}
    rest = [one for one in _in_order(pictures, seed) if one.image not in taken]
    return list(_opened(Path(data), rest[:count]))


def same(data: str, other: str) -> bool:
    """Whether both name the same data."""
    return Path(data).resolve() == Path(other).resolve()


def _drawn(data: str, count: int, first: int, families: tuple[str, ...]) -> Iterator[Sample]:
    families = families or (things.TURNS if data == THINGS else world.FAMILIES)
    for number in range(count):
        family = families[number % len(families)]
        if data == THINGS:
            yield of_scene(things.draw("train", UNSEEN + first + number, family))
        else:
            yield of_scene(world.draw("train", first + number, family))


def of_scene(scene: world.Scene | things.Scene) -> Sample:
    """A drawn picture, with all that is asked about it."""
    return Sample(scene.image, [(question.text, question.answer) for question in scene.questions])


@dataclass(frozen=True)
class _Picture:
    """A picture of a file, the turns of all its lines, and the number of the first of these."""

    image: Path
    turns: list[tuple[str, str]]
    line: int


def _pictures(path: Path, answered: bool) -> list[_Picture]:
    """All pictures of a file, in its order. Rows about one picture belong together: apart, some would be held out from others."""
    found: dict[Path, _Picture] = {}
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if line.strip():
            with _at(path, number):
                image, turns = _read_line(path, line, answered)
                found.setdefault(image, _Picture(image, [], number)).turns.extend(turns)
    return list(found.values())


def _in_order(pictures: Sequence[_Picture], seed: int) -> list[_Picture]:
    return Random(seed).sample(pictures, len(pictures))


def _opened(path: Path, pictures: Sequence[_Picture]) -> Iterator[Sample]:
    """The samples, each opened when its turn comes; that the files are there is checked at once."""
    for one in pictures:
        with _at(path, one.line), one.image.open("rb"):
            pass

    def samples() -> Iterator[Sample]:
        for one in pictures:
            with _at(path, one.line):
                image = _read_image(one.image)
            yield Sample(image, one.turns)

    return samples()


@contextmanager
def _at(path: Path, line: int) -> Iterator[None]:
    """What goes wrong inside is this line's fault."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{path}, line {line}: {type(error).__name__}: {error}") from error


def _read_line(path: Path, line: str, answered: bool) -> tuple[Path, list[tuple[str, str]]]:
    """The picture that a line names, and its turns."""
    entry = json.loads(line)
    if "conversations" in entry:
        values = [turn["value"] for turn in entry["conversations"]]
        if answered and len(values) % 2:
            raise ValueError("the last of its conversations has no answer")
        turns = list(zip(values[::2], values[1::2] if answered else [""] * len(values[::2]), strict=True))
    else:
        turns = [(entry["question"], entry["answer"] if answered else "")]
    if not turns:
        raise ValueError("its conversations are empty")
    for text in chain.from_iterable(turns):
        if not isinstance(text, str):
            raise TypeError(f"a question or answer must be a string, not {json.dumps(text)[:40]}")
    return path.parent / entry["image"], [(question.replace("<image>", "").strip(), answer) for question, answer in turns]


def _read_image(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes())
    except ImageError as error:
        raise ImageError(error.reason, f"{path}: {error}") from error
