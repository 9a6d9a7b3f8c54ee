"""Training batches: one picture, many conversations about it, packed so that they share the picture's rows.

Row layout of one sequence: `<|im_start|>user\\n<image>*V`, then the conversations side by side. Each sees the picture and itself,
at the positions that it would have alone. V is 289, all of a picture's visual tokens, or fewer, as many as merging leaves: which
those are, and so their positions, is only known when the picture has been looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from checkpoints import things
from checkpoints.smol import crowded, tags
from checkpoints.smol.crowded import SIDE

VISUAL = SIDE * SIDE
TAG_SIDE = 9
"""Parts along a side of a picture that the tagger names."""
IGNORE = -100
LONG = ("describe", "list", "row", "read")
"""Types whose answers name most of the picture."""
END, START = "<|im_end|>", "<|im_start|>"


@dataclass(frozen=True)
class Said:
    """What is asked, how it should be answered, and of which type the question is."""

    type: str
    text: str
    answer: str


class Packer:
    """Turns conversations into rows of one length: ids, positions, segment (0 is the picture, -1 padding) and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, follow_up: float = 0.15) -> None:
        self._tokenizer = tokenizer
        self.follow_up = follow_up
        self.head = self._encode(f"{START}user\n")
        self._answer = self._encode(f"{END}\n{START}assistant\n")
        self._again = self._encode(f"\n{START}user\n")
        self._end = self._encode(END)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def pack(self, asked: Sequence[Said], visual: int, rows: int, rng: Random) -> dict[str, Any]:
        """One sequence with so many visual tokens; what does not fit is left out."""
        head = len(self.head)
        ids = [*self.head, *[0] * visual]
        positions = [*range(len(ids))]
        after = head + VISUAL
        segments, labels = [0] * len(ids), [IGNORE] * len(ids)
        talk, position, turns, taken = 0, after, 0, []
        for said in asked:
            follows = 0 < turns < 3 and rng.random() < self.follow_up
            prompt = (self._again if follows else []) + self._encode(said.text) + self._answer
            answer = self._encode(said.answer) + self._end
            count = len(prompt) + len(answer)
            if len(ids) + count > rows:
                continue
            if not follows:
                talk, position, turns = talk + 1, after, 0
            taken.append((said, len(ids) + len(prompt), len(ids) + count))
            ids += prompt + answer
            labels += [IGNORE] * len(prompt) + answer
            positions += range(position, position + count)
            segments += [talk] * count
            position, turns = position + count, turns + 1
        return _fill(rows, ids, positions, segments, labels) | {"taken": taken}


def _fill(rows: int, ids: list[int], positions: list[int], segments: list[int], labels: list[int]) -> dict[str, Any]:
    spare = rows - len(ids)
    return {
        "ids": np.array(ids + [2] * spare), "positions": np.array(positions + [0] * spare),
        "segments": np.array(segments + [-1] * spare), "labels": np.array(labels + [IGNORE] * spare),
    }  # fmt: skip


def conversation(scene: things.Scene, rng: Random, long: int = 1) -> list[Said]:
    """The questions of a scene in a random order, at most `long` of the long ones first."""
    asked = [Said(q.type, q.text, q.answer) for q in scene.questions]
    rng.shuffle(asked)
    longs = [q for q in asked if q.type in LONG]
    return longs[:long] + [q for q in asked if q.type not in LONG] + longs[long:]


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size as uint8 [n, height, width, 3]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


def answer_weights(row: dict[str, Any], rows: int) -> np.ndarray:
    """Each answer counts as the root of its length, so that a long one does not drown the short ones."""
    weight = np.zeros(rows, np.float32)
    for _, start, end in row["taken"]:
        weight[start:end] = (end - start) ** -0.5
    return weight


@dataclass(frozen=True)
class Sizes:
    """Of one batch: scenes with conversations, crowded pictures, and the rows that conversations about a scene may take."""

    scenes: int
    crowded: int
    rows: int


class Batches(Dataset[dict[str, Any]]):
    """Batch number `index`, drawn when it is asked for: same index, same batch.

    The pictures are `sizes.scenes` scenes and then `sizes.crowded` crowded ones: `pixels` uint8 [n, side, side, 3]. Of the scenes:
    the number of visual tokens `kept`, the packed rows `ids`, `positions`, `segments`, `labels` and `weights` [scenes, rows], and
    `taken`, what is asked in which rows; the tags that are `told` of them [scenes], -1 for what the tagger sees, and how surely in
    each part: `sure` [scenes, 9, 9]. Of the crowded: `shown` [crowded, 289], what `crowded.draw` gives.
    """

    def __init__(
        self, packer: Packer, sizes: Sizes, kept: Sequence[int], split: str = "train", count: int = 1 << 40,
        turns: Sequence[str] = things.TURNS,
    ) -> None:  # fmt: skip
        """Batches take the numbers of visual tokens `kept` in turn, scenes the families `turns`."""
        self.packer, self.sizes, self.kept, self.split, self.count, self.turns = packer, sizes, kept, split, count, turns

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = Random(f"{self.split}/batch/{index}")
        sizes, hands = self.sizes, things.HANDS[self.split]
        numbers = range(index * sizes.scenes, (index + 1) * sizes.scenes)
        scenes, told, sure = zip(*map(self._scene, numbers), strict=True)
        crowds = [crowded.draw(index * sizes.crowded + n, hands) for n in range(sizes.crowded)]
        count = self.kept[index % len(self.kept)]
        rows = (sizes.rows + count + 7) // 8 * 8  # attention takes masks of such lengths as they are
        packed = [self.packer.pack(conversation(scene, rng), count, rows, rng) for scene in scenes]
        return stack(packed) | {
            "kept": count,
            "weights": torch.from_numpy(np.stack([answer_weights(row, rows) for row in packed])),
            "taken": [row["taken"] for row in packed],
            "told": torch.tensor(told),
            "sure": torch.from_numpy(np.stack(sure)),
            "pixels": pixels([*(scene.image for scene in scenes), *(image for image, _ in crowds)]),
            "shown": torch.from_numpy(np.array([shown for _, shown in crowds], np.int64).reshape(sizes.crowded, VISUAL)),
        }

    def _scene(self, number: int) -> tuple[things.Scene, int, np.ndarray]:
        """A scene, the tag that is told of it and how surely."""
        family = self.turns[number % len(self.turns)]
        if family == tags.TAGGED:
            return tags.draw(number, TAG_SIDE)
        return things.draw(self.split, number, family), -1, np.zeros((TAG_SIDE, TAG_SIDE), np.float32)


def stack(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in ("ids", "positions", "segments", "labels")}
