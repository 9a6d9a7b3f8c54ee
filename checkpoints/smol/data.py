"""Training batches: one picture, many conversations about it, packed so that they share the picture's rows.

Row layout of one sequence: `<|im_start|>user\\n<image>*V`, then the conversations side by side. Each sees the picture and itself,
at the positions that it would have alone. Most of the time the language model is given V of the picture's 289 visual tokens: what
shows the things and some of the ground, at their own positions, as a router would leave them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from models.vision.efficientnet import Maps

SIDE = 17
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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int, follow_up: float = 0.15) -> None:
        self._tokenizer = tokenizer
        self.rows, self.follow_up = rows, follow_up
        self.head = self._encode(f"{START}user\n")
        self._answer = self._encode(f"{END}\n{START}assistant\n")
        self._again = self._encode(f"\n{START}user\n")
        self._end = self._encode(END)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def pack(self, asked: Sequence[Said], kept: np.ndarray, rng: Random, follow_up: float | None = None) -> dict[str, Any]:
        """One sequence with the visual tokens `kept` (their places among the 289); what does not fit is left out."""
        follow_up = self.follow_up if follow_up is None else follow_up
        head = len(self.head)
        ids = [*self.head, *[0] * len(kept)]
        positions = [*range(head), *(head + int(place) for place in kept)]
        after = head + VISUAL
        segments, labels = [0] * len(ids), [IGNORE] * len(ids)
        talk, position, turns, taken = 0, after, 0, []
        for said in asked:
            follows = 0 < turns < 3 and rng.random() < follow_up
            prompt = (self._again if follows else []) + self._encode(said.text) + self._answer
            answer = self._encode(said.answer) + self._end
            count = len(prompt) + len(answer)
            if len(ids) + count > self.rows:
                continue
            if not follows:
                talk, position, turns = talk + 1, after, 0
            taken.append((said, len(ids) + len(prompt), len(ids) + count))
            ids += prompt + answer
            labels += [IGNORE] * len(prompt) + answer
            positions += range(position, position + count)
            segments += [talk] * count
            position, turns = position + count, turns + 1
        return self._fill(ids, positions, segments, labels) | {"taken": taken}

    def text(self, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Plain texts side by side; every token is a label."""
        ids: list[int] = []
        positions: list[int] = []
        segments: list[int] = []
        labels: list[int] = []
        for number, sequence in enumerate(sequences, 1):
            ids += sequence
            positions += range(len(sequence))
            segments += [number] * len(sequence)
            labels += [IGNORE, *sequence[1:]]
        cut = slice(self.rows)
        return self._fill(ids[cut], positions[cut], segments[cut], labels[cut]) | {"taken": []}

    def _fill(self, ids: list[int], positions: list[int], segments: list[int], labels: list[int]) -> dict[str, Any]:
        spare = self.rows - len(ids)
        return {
            "ids": np.array(ids + [2] * spare), "positions": np.array(positions + [0] * spare),
            "segments": np.array(segments + [-1] * spare), "labels": np.array(labels + [IGNORE] * spare),
        }  # fmt: skip


def conversation(record: dict[str, Any], rng: Random, long: int = 1) -> list[Said]:
    """The questions of a scene in a random order, at most `long` of the long ones, those first."""
    asked = [Said(q[0], q[1], q[2]) for q in record["questions"]]
    rng.shuffle(asked)
    longs = [q for q in asked if q.type in LONG]
    return longs[:long] + [q for q in asked if q.type not in LONG] + longs[long:]


def keep(record: dict[str, Any], count: int, rng: Random) -> np.ndarray:
    """Places of the `count` visual tokens that stay, ascending: most are of the marks, each as often, the rest from anywhere."""
    if count >= VISUAL:
        return np.arange(VISUAL)
    dice = np.random.default_rng(rng.randrange(1 << 30))
    weight = np.full(VISUAL, 0.25 / VISUAL)
    for left, top, right, bottom, *_ in record["marks"]:
        x0, y0 = int(max(left, 0) * SIDE), int(max(top, 0) * SIDE)
        x1, y1 = min(SIDE, max(x0 + 1, round(right * SIDE))), min(SIDE, max(y0 + 1, round(bottom * SIDE)))
        inside = np.zeros((SIDE, SIDE))
        inside[y0:y1, x0:x1] = 1
        weight += 0.75 / len(record["marks"]) * (inside / inside.sum()).reshape(-1)
    return np.sort(dice.choice(VISUAL, count, replace=False, p=weight / weight.sum()))


Part = tuple[Maps, dict[str, Any]]
"""A scene: what the network saw of it, and its record."""


def stack_maps(maps: Sequence[Maps]) -> Maps:
    return Maps(*(torch.stack([getattr(one, name) for one in maps]) for name in ("fine", "coarse", "wide")))


class Scenes:
    """The scenes of a folder of shards; more may come while it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shards: dict[Path, tuple[dict[str, Any], list[dict[str, Any]]]] = {}

    def refresh(self) -> int:
        for path in sorted(self.folder.glob("*.pt")):
            if path not in self._shards:
                shard = torch.load(path, weights_only=True, mmap=True)
                self._shards[path] = shard, json.loads(shard["records"])
        return len(self)

    def __len__(self) -> int:
        return sum(len(records) for _, records in self._shards.values())

    def __iter__(self) -> Iterator[Part]:
        for path in self._shards:
            shard, records = self._shards[path]
            for i, record in enumerate(records):
                yield Maps(shard["fine"][i], shard["coarse"][i], shard["wide"][i]), record

    def sample(self, rng: Random, families: Sequence[str] = ()) -> Part:
        """A scene of one of the `families`, or of any."""
        while True:
            shard, records = self._shards[rng.choice(list(self._shards))]
            i = rng.randrange(len(records))
            if not families or records[i]["family"] in families:
                return Maps(shard["fine"][i], shard["coarse"][i], shard["wide"][i]), records[i]
