"""Calibration samples: pictures with questions and their answers, from the embedded world or from a file in LLaVA's format.

Questions about one picture share its rows: each sees the picture and itself, at the positions that it would have alone. Nine
questions cost twice what one does, for nine times the answer tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from random import Random

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from models.embedded import world
from models.preprocess import Preprocessor


class DataError(ValueError):
    """The calibration data cannot be used; the message names the line and what to do."""


@dataclass(frozen=True)
class Sample:
    """A picture and its questions, side by side behind the rows that all of them share.

    ids: [n] int64, image tokens expanded. pixels: [1, 3, height, width] float32. answers: [n] bool, the tokens of answers.
    talks: [n] int64, which question a row is of, from 1; 0 for the shared ones. positions: [n] int64.
    """

    ids: Tensor
    pixels: Tensor
    answers: Tensor
    talks: Tensor
    positions: Tensor

    def inputs(self, model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
        """Arguments of the transformers model."""
        return {**self.text(model), "pixel_values": self.pixels.to(model.device, model.dtype)}

    def text(self, model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
        """The same without the picture: input_ids and position_ids [1, n], attention_mask [1, 1, n, n], additive."""
        order = torch.arange(len(self.ids))
        seen = (self.talks[:, None] == self.talks) | (self.talks == 0)
        seen &= order[:, None] >= order
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        inputs = {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": mask[None]}
        return {name: tensor[None].to(model.device) for name, tensor in inputs.items()}

    @property
    def before_answers(self) -> Tensor:
        """The rows whose logits say the answers' tokens: int64 [answer tokens]."""
        return self.answers.nonzero()[:, 0] - 1


def embedded_world(
    preprocessor: Preprocessor, count: int, seed: int, split: str = "train", families: Sequence[str] = world.FAMILIES
) -> list[Sample]:
    """`count` pictures of the world, its families in turn, with all that is asked about each."""
    scenes = [world.draw(split, seed * 1_000_000 + i, families[i % len(families)]) for i in range(count)]
    return [of_scene(preprocessor, scene) for scene in scenes]


def of_scene(preprocessor: Preprocessor, scene: world.Scene) -> Sample:
    """A picture of the world with its questions; talk k is question k - 1."""
    return _sample(preprocessor, scene.image, [(question.text, question.answer) for question in scene.questions])


def from_file(preprocessor: Preprocessor, path: Path, count: int, seed: int) -> list[Sample]:
    """`count` samples, drawn without repetition, of a JSONL file of {"image", "question", "answer"}, or of LLaVA's own
    {"image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}, each turn a question of its own.

    Image paths are relative to the file. Raises DataError for a line that cannot be read and for too few samples.
    """
    lines = [(number, line) for number, line in enumerate(path.read_text("utf-8").split("\n"), 1) if line.strip()]
    if len(lines) < count:
        raise DataError(f"{path} has {len(lines)} samples and {count} are asked for; add some, or lower --samples")
    return [_read(preprocessor, path, number, line) for number, line in Random(seed).sample(lines, count)]


def _read(preprocessor: Preprocessor, path: Path, number: int, line: str) -> Sample:
    try:
        entry = json.loads(line)
        if "conversations" in entry:
            values = [turn["value"] for turn in entry["conversations"]]
            turns = list(zip(values[::2], values[1::2], strict=True))
        else:
            turns = [(entry["question"], entry["answer"])]
        with Image.open(path.parent / entry["image"]) as image:
            asked = [(question.replace("<image>", "").strip(), answer) for question, answer in turns]
            return _sample(preprocessor, image.convert("RGB"), asked)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}") from error


def _sample(preprocessor: Preprocessor, image: Image.Image, turns: Sequence[tuple[str, str]]) -> Sample:
    tokenizer = preprocessor.tokenizer
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    prompts, answers = [], []
    for question, answer in turns:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompts.append(preprocessor.prompt([{"role": "user", "content": content}]))
        answers.append(tokenizer(f" {answer}", add_special_tokens=False).input_ids + end)
    # What every prompt begins with; its last row, which says the answer's first token, is each question's own.
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    ids, spoken, talks, positions = prompts[0][:shared], [False] * shared, [0] * shared, list(range(shared))
    for talk, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        own = prompt[shared:] + answer
        ids = ids + own
        spoken += [False] * (len(own) - len(answer)) + [True] * len(answer)
        talks += [talk] * len(own)
        positions += range(shared, shared + len(own))  # where it would be alone
    rows = (torch.tensor(column) for column in (spoken, talks, positions))
    return Sample(torch.tensor(ids), preprocessor.pixels(image)[None], *rows)
