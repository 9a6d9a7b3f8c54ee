"""Samples as the transformers model takes them: all questions about a picture, with their answers, packed into one sequence.

They share the picture's rows: each sees the picture and itself, at the positions that it would have alone. Nine questions cost
twice what one does, for nine times the answer tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.preprocess import Picture, Preprocessor
from pruning.samples import Sample


@dataclass(frozen=True)
class PackedSample:
    """A picture and its questions, side by side behind the rows that all of them share.

    ids: [n] int64, image tokens expanded. image_size: height and width of the picture before it was cut into tiles. answers:
    [n] bool, the tokens of answers. segments: [n] int64, which question a row is of, from 1; 0 for the shared ones. positions: [n]
    int64.
    """

    ids: Tensor
    picture: Picture
    image_size: tuple[int, int]
    answers: Tensor
    segments: Tensor
    positions: Tensor

    def inputs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Arguments of the transformers model."""
        return {**self.text(model), **self.image(model)}

    def image(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The picture alone."""
        pixels = self.picture.pixels.to(model.device, model.dtype)
        if not self.picture.layout.newline:
            return {"pixel_values": pixels}
        return {"pixel_values": pixels[None], "image_sizes": torch.tensor([self.image_size], device=model.device)}

    def text(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The same without the picture: input_ids and position_ids [1, n], attention_mask [1, 1, n, n], additive."""
        order = torch.arange(len(self.ids))
        seen = (self.segments[:, None] == self.segments) | (self.segments == 0)
        seen &= order[:, None] >= order
        mask = torch.zeros(seen.shape, dtype=model.dtype).masked_fill(~seen, torch.finfo(model.dtype).min)
        inputs = {"input_ids": self.ids, "position_ids": self.positions, "attention_mask": mask[None]}
        return {name: tensor[None].to(model.device) for name, tensor in inputs.items()}

    @property
    def before_answers(self) -> Tensor:
        """The rows whose logits say the answers' tokens: int64 [answer tokens]."""
        return self.answers.nonzero()[:, 0] - 1


def pack(preprocessor: Preprocessor, sample: Sample) -> PackedSample:
    """One sequence of a picture and its turns; segment k is turn k - 1."""
    picture = preprocessor.picture(sample.image)
    prompts, answers = [], []
    for turn in sample.turns:
        prompt, said, end = preprocessor.answered(*turn, [picture.layout])
        prompts.append(prompt)
        answers.append(said + end)
    # What every prompt begins with; its last row, which says the answer's first token, is each question's own.
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    ids, spoken, segments, positions = prompts[0][:shared], [False] * shared, [0] * shared, list(range(shared))
    for segment, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        own = prompt[shared:] + answer
        ids = ids + own
        spoken += [False] * (len(own) - len(answer)) + [True] * len(answer)
        segments += [segment] * len(own)
        positions += range(shared, shared + len(own))  # where it would be alone
    rows = (torch.tensor(column) for column in (spoken, segments, positions))
    return PackedSample(torch.tensor(ids), picture, (sample.image.height, sample.image.width), *rows)
