"""Samples for calibration and training: pictures and what is asked about them, from a JSONL file or drawn on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """`count` samples: drawn scenes, or lines of a JSONL file in a random order without repetition.

    A line is {"image", "question", "answer"} or LLaVA's own {"image", "conversations": [{"from": "human", "value"}, {"from": "gpt",
    "value"}, ...]}; image paths are relative to the file. Unless `answered`, answers are not read. `families` of drawn scenes take
    turns, all of them if none is named. Raises DataError for a line that cannot be read and for too few of them.
    """
    if data in FAMILIES:
        return _drawn(data, count, seed * 1_000_000, tuple(families))
    return _read_file(Path(data), count, seed, answered)


def read_rest(data: str, count: int, used: int, seed: int, families: Sequence[str] = ()) -> list[Sample]:
    """Up to `count` samples, without answers, that are not among the `used` ones that `read` gives: fewer, or none, where a file
    ends. Raises DataError as `read` does."""
    if data in FAMILIES:
        return list(_drawn(data, count, seed * 1_000_000 + used, tuple(families)))
    taken = {number for number, _ in _chosen(Path(data), used, seed)}
    rest = [line for line in _lines(Path(data)) if line[0] not in taken]
    return list(_read_lines(Path(data), Random(seed).sample(rest, min(count, len(rest))), answered=False))


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


def _read_file(path: Path, count: int, seed: int, answered: bool) -> Iterator[Sample]:
    yield from _read_lines(path, _chosen(path, count, seed), answered)


def _chosen(path: Path, count: int, seed: int) -> list[tuple[int, str]]:
    lines = _lines(path)
    if len(lines) < count:
        raise DataError(f"{path} has {len(lines)} samples and {count} are asked for; add some, or ask for fewer")
    return Random(seed).sample(lines, count)


def _lines(path: Path) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(path.read_text("utf-8").split("\n"), 1) if line.strip()]


def _read_lines(path: Path, lines: Sequence[tuple[int, str]], answered: bool) -> Iterator[Sample]:
    for number, line in lines:
        try:
            yield _read_line(path, line, answered)
        except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
            raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}") from error


def _read_line(path: Path, line: str, answered: bool) -> Sample:
    entry = json.loads(line)
    if "conversations" in entry:
        values = [turn["value"] for turn in entry["conversations"]]
        turns = list(zip(values[::2], values[1::2] if answered else [""] * len(values[::2]), strict=True))
    else:
        turns = [(entry["question"], entry["answer"] if answered else "")]
    image = _read_image(path.parent / entry["image"])
    return Sample(image, [(question.replace("<image>", "").strip(), answer) for question, answer in turns])


def _read_image(path: Path) -> Image.Image:
    try:
        return decode(path.read_bytes())
    except ImageError as error:
        raise ImageError(error.reason, f"{path}: {error}") from error
