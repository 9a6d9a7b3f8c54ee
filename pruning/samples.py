"""Samples for calibration and training: pictures and what is asked about them, from a JSONL file or from the world of drawings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from checkpoints import world
from models.checkpoint import sha256
from models.images import ImageError, decode
from models.manifest import read_manifest

WORLD = "world"
"""The data that ships with Espalier: drawings of 96 pixels, and questions about them."""
FAMILIES = world.FAMILIES
"""The families of those drawings."""


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
            f"--data {WORLD} takes the drawings of 96 pixels that ship with Espalier"
        )
    if data != WORLD and not Path(data).is_file():
        raise DataError(f"data: {data} is not a file; name a JSONL file, or `{WORLD}`")
    return data


def content(data: str) -> str:
    """What tells two states of the same file apart; empty for the world, which never changes."""
    return "" if data == WORLD else sha256(Path(data))


def read(data: str, count: int, seed: int, *, answered: bool = True, families: Sequence[str] = FAMILIES) -> Iterator[Sample]:
    """`count` samples: of the world, or lines of a JSONL file, drawn without repetition.

    A line is {"image", "question", "answer"} or LLaVA's own {"image", "conversations": [{"from": "human", "value"}, {"from": "gpt",
    "value"}, ...]}; image paths are relative to the file. Unless `answered`, answers are not read. `families` are the world's, in
    turn. Raises DataError for a line that cannot be read and for too few of them.
    """
    if data == WORLD:
        return (of_scene(world.draw("train", seed * 1_000_000 + i, families[i % len(families)])) for i in range(count))
    return _read_file(Path(data), count, seed, answered)


def of_scene(scene: world.Scene) -> Sample:
    """A picture of the world, with all that is asked about it."""
    return Sample(scene.image, [(question.text, question.answer) for question in scene.questions])


def _read_file(path: Path, count: int, seed: int, answered: bool) -> Iterator[Sample]:
    lines = [(number, line) for number, line in enumerate(path.read_text("utf-8").split("\n"), 1) if line.strip()]
    if len(lines) < count:
        raise DataError(f"{path} has {len(lines)} samples and {count} are asked for; add some, or ask for fewer")
    for number, line in Random(seed).sample(lines, count):
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
