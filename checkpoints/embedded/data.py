"""Training batches: one picture and several conversations about it, packed into one sequence.

A sequence is `<s>USER: <image>*V \\n` (the prefix), then the conversations one after the other. Each conversation attends to the
prefix and to itself, at the positions that it would have alone. So eight conversations cost one picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from checkpoints.embedded.build import EOS, PATCH
from checkpoints.world import COLORS, FAMILIES, SIZE, WHATS, Drill, Mark, Question, Scene, draw

GRID = SIZE // PATCH
WHAT_CLASSES, COLOR_CLASSES, DETAIL_CLASSES = len(WHATS) + 1, len(COLORS) + 1, 17
_WHAT = {name: i + 1 for i, name in enumerate(WHATS)}
_COLOR = {name: i + 1 for i, name in enumerate(COLORS)}
LONG_TYPES = ("describe", "list", "row", "read")
"""Answers that name most of the picture: the captions that teach which color belongs to which shape."""
IGNORE = -100


def patch_labels(marks: list[Mark]) -> np.ndarray:
    """The `what`, color and detail class of each patch: int64 [3, GRID, GRID]; 0 is nothing. Later marks lie on top."""
    labels = np.zeros((3, GRID, GRID), np.int64)
    for mark in marks:
        left, top, right, bottom = (v / PATCH for v in mark.box)
        # A patch belongs to a mark when its center is inside; a mark smaller than that owns the patch it stands in.
        x0, y0 = round(max(left, 0)), round(max(top, 0))
        x1, y1 = max(round(right), x0 + 1), max(round(bottom), y0 + 1)
        color = _COLOR[mark.color] if mark.color else 0
        labels[:, y0:y1, x0:x1] = np.array([_WHAT[mark.what], color, mark.detail])[:, None, None]
    return labels


def presence_labels(marks: list[Mark]) -> np.ndarray:
    """Which (what, color) pairs are in the picture: float32 [WHAT_CLASSES * COLOR_CLASSES], for the class token."""
    present = np.zeros((WHAT_CLASSES, COLOR_CLASSES), np.float32)
    for mark in marks:
        present[_WHAT[mark.what], _COLOR[mark.color] if mark.color else 0] = 1
    return present.reshape(-1)


@dataclass(frozen=True)
class Mix:
    """What a sequence of `length` tokens holds: `long` long answers and `drills` drills first, then short answers until it is full.

    `follow_up` is the chance that a question continues the conversation before it, as its next turn.
    """

    length: int
    long: int
    drills: int = 0
    follow_up: float = 0.0


def questions(scene: Scene, mix: Mix, rng: Random) -> list[Question | Drill]:
    long = [q for q in scene.questions if q.type in LONG_TYPES]
    short = [q for q in scene.questions if q.type not in LONG_TYPES]
    rng.shuffle(long)
    rng.shuffle(short)
    drills = rng.sample(scene.drills, min(mix.drills, len(scene.drills)))
    return [*long[: mix.long], *drills, *short, *long[mix.long :]]


class Packer:
    """Packs conversations into sequences of ids, positions, segments (0 is the prefix, -1 padding) and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, visual_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._image = tokenizer.convert_tokens_to_ids("<image>")
        self._head = tokenizer("USER: ").input_ids
        self._newline = tokenizer("\n", add_special_tokens=False).input_ids
        self.first_visual = len(self._head)
        self.visual_tokens = visual_tokens
        self._cache: dict[str, list[int]] = {}

    def _encode(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer(text, add_special_tokens=False).input_ids
            if len(self._cache) < 100_000:
                self._cache[text] = ids
        return ids

    def _turn(self, asked: Question | Drill, follows: bool) -> tuple[list[int], list[int]]:
        """The ids and labels of one turn. What is learned is the answer of a question, and the values of a drill."""
        if isinstance(asked, Question):
            prompt = self._encode(("USER: " if follows else "") + asked.text + " ASSISTANT:")
            answer = self._encode(f" {asked.answer}{EOS}")
            return prompt + answer, [IGNORE] * len(prompt) + answer
        ids = [*self._encode(f"{asked.type} ASSISTANT:")]
        labels = [IGNORE] * len(ids)
        for key, value in asked.pairs:
            # Nothing stands between the two: the value must be known at the last token of its key.
            key_ids, value_ids = self._encode(f" {key}"), self._encode(f" {value}")
            ids += key_ids + value_ids
            labels += [IGNORE] * len(key_ids) + value_ids
        return ids, labels

    def pack(self, asked: list[Question | Drill], mix: Mix, rng: Random) -> dict[str, np.ndarray]:
        """One sequence, padded to `mix.length`: each of its parts int64 [mix.length]. Questions that do not fit are left out.

        Text starts at the position where it would without pooling.
        """
        head, newline = self._head, self._newline
        ids = [*head, *[self._image] * self.visual_tokens, *newline]
        stride = GRID * GRID // self.visual_tokens
        text_start = len(head) + GRID * GRID
        after = text_start + len(newline)
        positions = [*range(len(head)), *range(len(head), text_start, stride), *range(text_start, after)]
        segments, labels = [0] * len(ids), [IGNORE] * len(ids)
        turn, position, segment = 0, after, 0
        for question in asked:
            follows = isinstance(question, Question) and 0 < turn < 3 and rng.random() < mix.follow_up
            turn_ids, turn_labels = self._turn(question, follows)
            count = len(turn_ids)
            if len(ids) + count > mix.length:
                continue
            if not follows:
                turn, position, segment = 0, after, segment + 1
            ids += turn_ids
            labels += turn_labels
            positions += range(position, position + count)
            segments += [segment] * count
            # No turn follows a drill: it has no end token.
            turn, position = turn + 1 if isinstance(question, Question) else 0, position + count
        parts = {"ids": ids, "positions": positions, "segments": segments, "labels": labels}
        padding = {"ids": 0, "positions": 0, "segments": -1, "labels": IGNORE}
        return {key: np.array(part + [padding[key]] * (mix.length - len(part))) for key, part in parts.items()}


class Batches(IterableDataset):
    """The batches of a stage's `steps`. Batch n always holds the same pictures and questions. `families` are sampling weights."""

    def __init__(
        self, packer: Packer, mix: Mix | None, size: int, steps: range, first_scene: int, families: tuple[int, ...]
    ) -> None:
        self._packer, self._mix, self._size, self._families = packer, mix, size, families
        self._steps, self._first_scene = steps, first_scene

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in self._steps:
            yield self._batch(self._first_scene + step * self._size)

    def _batch(self, first: int) -> dict[str, torch.Tensor]:
        numbers = range(first, first + self._size)
        scenes = [draw("train", n, Random(n).choices(FAMILIES, self._families)[0]) for n in numbers]
        batch = {"pixels": torch.from_numpy(np.stack([np.asarray(s.image) for s in scenes]).transpose(0, 3, 1, 2).copy())}
        batch["patches"] = torch.from_numpy(np.stack([patch_labels(s.marks) for s in scenes]))
        if self._mix is None:
            batch["presence"] = torch.from_numpy(np.stack([presence_labels(s.marks) for s in scenes]))
            return batch
        sequences = []
        for number, scene in enumerate(scenes, first):
            rng = Random(number)
            sequences.append(self._packer.pack(questions(scene, self._mix, rng), self._mix, rng))
        for key in sequences[0]:
            batch[key] = torch.from_numpy(np.stack([sequence[key] for sequence in sequences]))
        return batch
