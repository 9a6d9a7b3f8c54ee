"""Training batches: one picture, many conversations about it, packed so that they share the picture's rows.

Row layout of one sequence: `<|im_start|>user\\n<image>*V`, then the conversations side by side. Each sees the picture and itself,
at the positions that it would have alone. V is 289, all of a picture's visual tokens, or fewer: then those that show the things and
some of the ground, at their own positions, as a router would leave them.
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
from checkpoints.smol import crowded
from checkpoints.smol.crowded import SIDE

VISUAL = SIDE * SIDE
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

    def pack(self, asked: Sequence[Said], kept: np.ndarray, rows: int, rng: Random) -> dict[str, Any]:
        """One sequence with the visual tokens `kept` (their places among the 289); what does not fit is left out."""
        head = len(self.head)
        ids = [*self.head, *[0] * len(kept)]
        positions = [*range(head), *(head + int(place) for place in kept)]
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


def keep(boxes: Sequence[things.Box], count: int, rng: Random) -> np.ndarray:
    """Places of the `count` visual tokens that stay, ascending: most inside the boxes, each box as often, the rest anywhere."""
    if count >= VISUAL:
        return np.arange(VISUAL)
    dice = np.random.default_rng(rng.randrange(1 << 30))
    weight = np.full(VISUAL, 0.25 / VISUAL)
    for left, top, right, bottom in boxes:
        x0, y0 = int(max(left, 0) * SIDE), int(max(top, 0) * SIDE)
        x1, y1 = min(SIDE, max(x0 + 1, round(right * SIDE))), min(SIDE, max(y0 + 1, round(bottom * SIDE)))
        inside = np.zeros((SIDE, SIDE))
        inside[y0:y1, x0:x1] = 1
        weight += 0.75 / len(boxes) * (inside / inside.sum()).reshape(-1)
    return np.sort(dice.choice(VISUAL, count, replace=False, p=weight / weight.sum()))


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
    `kept` [scenes, V], the packed rows `ids`, `positions`, `segments`, `labels` and `weights` [scenes, rows], and `taken`, what is
    asked in which rows. Of the crowded: `shown` [crowded, 289], what `crowded.draw` gives.
    """

    def __init__(self, packer: Packer, sizes: Sizes, kept: Sequence[int], split: str = "train", count: int = 1 << 40) -> None:
        """Batches take the numbers of visual tokens `kept` in turn."""
        self.packer, self.sizes, self.kept, self.split, self.count = packer, sizes, kept, split, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = Random(f"{self.split}/batch/{index}")
        sizes, hands = self.sizes, things.HANDS[self.split]
        scenes = [things.draw(self.split, index * sizes.scenes + n) for n in range(sizes.scenes)]
        crowds = [crowded.draw(index * sizes.crowded + n, hands) for n in range(sizes.crowded)]
        count = self.kept[index % len(self.kept)]
        kept = [keep([mark.box for mark in scene.marks], count, rng) for scene in scenes]
        rows = (sizes.rows + count + 7) // 8 * 8  # attention takes masks of such lengths as they are
        packed = [self.packer.pack(conversation(scene, rng), k, rows, rng) for scene, k in zip(scenes, kept, strict=True)]
        return stack(packed) | {
            "kept": torch.from_numpy(np.stack(kept)),
            "weights": torch.from_numpy(np.stack([answer_weights(row, rows) for row in packed])),
            "taken": [row["taken"] for row in packed],
            "pixels": pixels([*(scene.image for scene in scenes), *(image for image, _ in crowds)]),
            "shown": torch.from_numpy(np.stack([shown for _, shown in crowds])).flatten(1).long(),
        }


def stack(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: torch.from_numpy(np.stack([row[key] for row in rows])) for key in ("ids", "positions", "segments", "labels")}
