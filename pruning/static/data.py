"""Calibration samples: pictures with questions and their answers, from the embedded world or from a file in LLaVA's format.

Questions about one picture share its rows: each sees the picture and itself, at the positions that it would have alone. Nine
questions cost twice what one does, for nine times the answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from checkpoints import world
from models import pictures
from models.preprocess import Preprocessor


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
    return [_sample(preprocessor, picture) for picture in pictures.from_world(count, seed, split, families)]


def of_scene(preprocessor: Preprocessor, scene: world.Scene) -> Sample:
    """A picture of the world with its questions; talk k is question k - 1."""
    return _sample(preprocessor, pictures.from_scene(scene))


def from_file(preprocessor: Preprocessor, path: Path, count: int, seed: int) -> list[Sample]:
    """`count` samples of a JSONL file (see `models.pictures`). Raises DataError for a line that cannot be read and for too few."""
    return [_sample(preprocessor, picture) for picture in pictures.from_file(path, count, seed)]


def _sample(preprocessor: Preprocessor, picture: pictures.Picture) -> Sample:
    tokenizer = preprocessor.tokenizer
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    prompts, answers = [], []
    for question, answer in picture.turns:
        prompts.append(preprocessor.question(question))
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
    return Sample(torch.tensor(ids), preprocessor.pixels(picture.image)[None], *rows)
