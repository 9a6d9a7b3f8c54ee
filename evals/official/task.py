"""A question of a data file, what a task does with it, and readers whose errors name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.official.judge import Judge

SHORT = "\nAnswer the question using a single word or phrase."
"""What LLaVA-1.5 was trained to be asked for a short answer with."""
LETTER = "\nAnswer with the option's letter from the given choices directly."
"""The same for a choice."""
SHORT_TOKENS, LONG_TOKENS = 128, 1024
"""How long an answer may be, as in LLaVA's own runs."""


class DataError(ValueError):
    """A data file cannot be used; the message names it, with the line or entry."""


@dataclass(frozen=True)
class Question:
    """One question. `text` is the prompt as it is sent; `image` a file, a file's bytes or nothing; `where` its file and line.
    `reference` is the right answer, None where the official file withholds it; `entry` what else of the file a score or an upload
    needs. `groups` are those that it is counted in."""

    id: str | int
    text: str
    image: Path | bytes | None
    where: str
    reference: Any = None
    groups: tuple[str, ...] = ()
    entry: Any = None

    @property
    def key(self) -> tuple[str | int, str]:
        """What no other question of the file has; ids alone may repeat."""
        return self.id, self.text

    @property
    def picture(self) -> Any:
        """What questions about the same picture share."""
        return self.image or self.key


Figures = dict[str, float]
Files = dict[str, bytes]


def _nothing(questions: Sequence[Question], answers: Sequence[Any]) -> dict[str, Any]:
    return {}


def _no_files(data: Path) -> None:
    pass


@dataclass(frozen=True)
class Task:
    """`read` takes the data's folder and a split, and raises DataError. `score` is that of an answer, 0 to 1. A task that a judge
    scores has `review` instead, a record with a `score`; `judge_reads` raises DataError if what the judge is to be told is missing.
    `figures` are what the official script reports beyond a mean; an answer is None there where the model refused. `files` are what
    the official server or judge reads, by name. `measure` names the mean."""

    read: Callable[[Path, str | None], list[Question]]
    score: Callable[[Question, str], float] | None
    max_tokens: int = SHORT_TOKENS
    measure: str = "accuracy"
    figures: Callable[[Sequence[Question], Sequence[str | None]], Figures] = _nothing
    files: Callable[[Sequence[Question], Sequence[str]], Files] = _nothing
    review: Callable[[Judge, Path, Question, str], dict[str, Any]] | None = None
    judge_reads: Callable[[Path], Any] = _no_files
    review_figures: Callable[[Sequence[Question], Sequence[dict[str, Any]]], Figures] = _nothing


@contextmanager
def at(where: str) -> Iterator[None]:
    """What goes wrong inside is the data's fault, at this place."""
    try:
        yield
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{where}: it has no {error.args[0]!r}; is this the task's official file?") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where}: {error}; is this the task's official file?") from error


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing; docs/evaluation.md lists the files of each task") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text: {error}") from error


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON: {error.msg}") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place and its object."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not JSON: {error.msg}") from error
            if not isinstance(entry, dict):
                raise DataError(f"{where}: not a JSON object")
            yield where, entry


def entries(path: Path, listed: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Each entry of a JSON file's list with its place: its number and what it is called by `name`."""
    if not isinstance(listed, list):
        raise DataError(f"{path}: not a list of entries; is this the task's official file?")
    for number, entry in enumerate(listed, 1):
        called = f" ({name} {entry[name]})" if isinstance(entry, dict) and name in entry else ""
        yield f"{path}, entry {number}{called}", entry


def mapped(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Key, place and value of each entry of a JSON file that holds an object."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path}: not a JSON object; is this the task's official file?")
    for key, value in found.items():
        yield key, f"{path}, entry {key!r}", value


def check_pictures(questions: Sequence[Question]) -> None:
    """Raises DataError before anything is asked if a picture is not there."""
    for question in questions:
        if isinstance(question.image, Path) and not question.image.is_file():
            raise DataError(f"{question.where}: the picture {question.image} is missing")


def sample(questions: list[Question], limit: int | None) -> list[Question]:
    """`limit` questions or a few more, all of a picture or none, drawn with a fixed seed; in the file's order. A larger limit
    holds what a smaller one does."""
    if not limit or limit >= len(questions):
        return questions
    pictures = list(dict.fromkeys(question.picture for question in questions))
    Random(0).shuffle(pictures)
    asked: set[Any] = set()
    counts: dict[Any, int] = {}
    for question in questions:
        counts[question.picture] = counts.get(question.picture, 0) + 1
    total = 0
    for picture in pictures:
        if total >= limit:
            break
        asked.add(picture)
        total += counts[picture]
    return [question for question in questions if question.picture in asked]
