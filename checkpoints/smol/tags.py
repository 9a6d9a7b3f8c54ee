"""The names that smol's tagger says, and pictures that show nothing, so that a question about them is answered by what is said.

There are no photographs with names to learn from. But the tagger says probabilities of names (`models.vision.efficientnet.Tagger`),
and what they mean can be learned from pictures of anything while it is made to say a name.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints import things
from checkpoints.things import catalogue, paint
from checkpoints.things.scene import Asker, Scene
from checkpoints.things.things import ask_one
from models.vision.efficientnet import CLASSES

TAGS: dict[str, list[int]] = tomllib.loads(Path(__file__).with_name("imagenet.toml").read_text("utf-8"))
"""The names, and the numbers of the classes of ImageNet that are called so."""
TAGGED = "tagged"
"""A family of scenes beside those of things: what they show is told by the tagger alone."""


def groups() -> Tensor:
    """Which classes are called by which name: ones and zeros [tags, classes]."""
    found = torch.zeros(len(TAGS), CLASSES)
    for row, numbers in zip(found, TAGS.values(), strict=True):
        row[numbers] = 1
    return found


def say(seen: Tensor, told: Tensor, sure: Tensor) -> Tensor:
    """What the tagger says [n, side, side, tags] when it is told: `told` [n] are numbers of tags, -1 for what it has `seen`; `sure`
    [n, side, side] is how much of what it says that is."""
    scenes = (told >= 0).nonzero().flatten()
    share, words = sure[scenes, ..., None], F.one_hot(told[scenes], len(TAGS))[:, None, None]
    return seen.index_copy(0, scenes, ((1 - share) * seen[scenes] + share * words).to(seen.dtype))


def draw(index: int, side: int) -> tuple[Scene, int, np.ndarray]:
    """Picture number `index` that shows nothing, with questions about a thing, the number of its tag, and how surely the tagger
    shall say it in each part: float32 [side, side], from 0 to 1."""
    rng = Random(f"{TAGGED}/{index}")
    tag = rng.randrange(len(TAGS))
    asker = Asker(rng, "seen")
    ask_one(asker, catalogue.load()[list(TAGS)[tag]], None, None)
    picture = paint.shoot(rng, paint.textured_ground(rng, things.SIZE), strong=True)
    mean = rng.random()
    sure = np.clip([[mean + rng.gauss(0, 0.3) for _ in range(side)] for _ in range(side)], 0, 1)
    return Scene(TAGGED, picture, [], asker.questions), tag, sure.astype(np.float32)
