"""Questions about the world of things: scenes of all families, or one thing to a picture, to be named."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from random import Random

from PIL import Image

from checkpoints import things
from evals.exam import Item


def questions(split: str, family: str | None, paraphrase: str) -> Iterator[tuple[Image.Image, Item]]:
    """Each scene with one of its questions, every type equally likely; without end. Families take turns unless one is named."""
    for index in count():
        scene = things.draw(split, index, family, paraphrase=paraphrase)
        yield scene.image, item(scene.family, Random(f"{split}/{index}").choice(scene.questions))


def names(split: str, paraphrase: str) -> Iterator[tuple[Image.Image, Item]]:
    """Pictures of one thing and the question what it is. Only its name or a listed synonym is right, so those that ask for a
    sentence are passed over. The family is the thing's kind."""
    for index in count():
        scene = things.draw(split, index, "one", paraphrase=paraphrase)
        for question in scene.questions:
            if question.type == "what":
                yield scene.image, item(scene.marks[0].kind, question)


def item(family: str, question: things.Question) -> Item:
    return Item(family, question.type, question.text, question.answer, partial(things.matches, question=question))
