"""Pictures and what is asked about them: from the embedded world, or from a JSONL file in LLaVA's format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from checkpoints import world


class DataError(ValueError):
    """The data cannot be used; the message names the line and what to do."""


@dataclass(frozen=True)
class Picture:
    """An RGB image, and the turns about it: (question, answer), each a question of its own."""

    image: Image.Image
    turns: list[tuple[str, str]]


def from_world(count: int, seed: int, split: str = "train", families: Sequence[str] = world.FAMILIES) -> Iterator[Picture]:
    """`count` pictures of the world, its families in turn, with all that is asked about each."""
    for i in range(count):
        yield from_scene(world.draw(split, seed * 1_000_000 + i, families[i % len(families)]))


def from_scene(scene: world.Scene) -> Picture:
    return Picture(scene.image, [(question.text, question.answer) for question in scene.questions])


def from_file(path: Path, count: int, seed: int, answered: bool = True) -> Iterator[Picture]:
    """`count` lines, drawn without repetition, of a JSONL file of {"image", "question", "answer"}, or of LLaVA's own
    {"image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}.

    Image paths are relative to the file. Unless `answered`, answers are not read. Raises DataError for a line that cannot be read
    and for too few of them.
    """
    lines = [(number, line) for number, line in enumerate(path.read_text("utf-8").split("\n"), 1) if line.strip()]
    if len(lines) < count:
        raise DataError(f"{path} has {len(lines)} samples and {count} are asked for; add some, or ask for fewer")
    for number, line in Random(seed).sample(lines, count):
        yield _read(path, number, line, answered)


def _read(path: Path, number: int, line: str, answered: bool) -> Picture:
    try:
        entry = json.loads(line)
        if "conversations" in entry:
            values = [turn["value"] for turn in entry["conversations"]]
            turns = list(zip(values[::2], values[1::2] if answered else [""] * len(values[::2]), strict=True))
        else:
            turns = [(entry["question"], entry["answer"] if answered else "")]
        with Image.open(path.parent / entry["image"]) as image:
            asked = [(question.replace("<image>", "").strip(), answer) for question, answer in turns]
            return Picture(image.convert("RGB"), asked)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
