"""The embedded world's questions: one to each held-out picture, families in turn, exact match."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from random import Random

from PIL import Image

from checkpoints.world import Question, draw
from evals.exam import Item, exactly


def questions(split: str, seed: int = 0) -> Iterator[tuple[Image.Image, Item]]:
    """Each picture of a split with one of its questions, every type of its family equally likely; without end."""
    for index in count():
        scene = draw(split, index)
        yield scene.image, item(scene.family, Random(f"{split}/{seed}/{index}").choice(scene.questions))


def item(family: str, question: Question) -> Item:
    return Item(family, question.type, question.text, question.answer, exactly(question.answer))
