"""The names that smol's tagger says, and what it is made to say in training."""

from __future__ import annotations

import numpy as np
import torch

from checkpoints import things
from checkpoints.smol import tags


def test_tags_are_names_of_things_and_a_class_has_one_at_most() -> None:
    assert set(tags.TAGS) <= set(things.NAMES)
    numbers = [number for classes in tags.TAGS.values() for number in classes]
    assert len(numbers) == len(set(numbers))
    groups = tags.groups()
    assert groups.sum() == len(numbers)
    assert groups[list(tags.TAGS).index("banana")].nonzero().tolist() == [[954]]


def test_what_is_told_is_said_as_surely_as_told() -> None:
    seen = torch.rand(2, 3, 3, len(tags.TAGS)) / len(tags.TAGS)
    sure = torch.rand(2, 3, 3)
    said = tags.say(seen, torch.tensor([-1, 7]), sure)
    assert torch.equal(said[0], seen[0])
    torch.testing.assert_close(said[1, ..., 7], sure[1] + (1 - sure[1]) * seen[1, ..., 7])
    torch.testing.assert_close(said[1, ..., 8], (1 - sure[1]) * seen[1, ..., 8])


def test_pictures_that_show_nothing_ask_about_what_is_told() -> None:
    scene, tag, sure = tags.draw(3, 4)
    again, _, same = tags.draw(3, 4)
    assert scene.image == again.image
    assert np.array_equal(sure, same)
    assert sure.shape == (4, 4) and sure.min() >= 0 and sure.max() <= 1
    assert not scene.marks
    [what] = [question for question in scene.questions if question.type.startswith("what") and "kind" not in question.type]
    assert things.matches(list(tags.TAGS)[tag], what)
    assert not {question.type for question in scene.questions} & {"color", "ground"}
