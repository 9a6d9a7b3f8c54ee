"""The tasks of `espalier eval` by name: where their questions come from, how many are asked, which options they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from checkpoints.things.drawings import DrawingsError
from evals import easy_vqa, photographs, scenes, things
from evals.exam import Item, Task

Items = Iterator[tuple[Image.Image, Item]]


@dataclass(frozen=True)
class Source:
    """`limit`: how many are asked unless a number is given; a source with fewer is asked to its end. `options`: what `questions`
    takes, with its default."""

    questions: Callable[..., Items]
    limit: int
    options: dict[str, str | None] = field(default_factory=dict)


SOURCES = {
    "scenes": Source(scenes.questions, 4000, {"split": "test"}),
    "things": Source(things.questions, 4000, {"split": "test", "family": None, "paraphrase": "seen"}),
    "names": Source(things.names, 2000, {"split": "test", "paraphrase": "seen"}),
    "photographs": Source(photographs.questions, 2000, {"split": "test"}),
    "easy-vqa": Source(easy_vqa.questions, 10_000, {"split": "test"}),
}


def open_task(name: str, limit: int | None = None, **given: str | None) -> Task:
    """A task with the options given; those that are None are left to their default. Raises ValueError for one it does not have."""
    source = SOURCES[name]
    used = {option: value for option, value in given.items() if value is not None}
    for option in used.keys() - source.options.keys():
        raise ValueError(f"the task {name} has no --{option}")
    options = source.options | used
    about = {"task": name} | {option: value for option, value in options.items() if value is not None}
    return Task(_plainly(source.questions, options), limit or source.limit, about)


def _plainly(questions: Callable[..., Items], options: dict[str, Any]) -> Items:
    """The items, with an error that a user can act on where the drawings cannot be had."""
    try:
        yield from questions(**options)
    except DrawingsError as error:
        raise ValueError(str(error)) from error
