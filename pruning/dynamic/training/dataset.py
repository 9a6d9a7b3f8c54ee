"""Ask the un-pruned model about pictures and note what the router is to foresee."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from random import Random

import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from models.checkpoint import Checkpoint
from models.run_state import RunState
from pruning.dynamic.router import words
from pruning.dynamic.training.config import Lesson
from pruning.dynamic.training.teacher import Asked, answers, observe, passing_costs
from pruning.samples import Sample, read

CHUNK = 8
"""Pictures watched between two saves."""
COSTLY = 3
"""Of every so many pictures the cost of passing each layer by is measured: it takes a forward pass a layer."""
SECOND = 4
"""One in so many questions that are learned from is the second of a chat."""
ALTERNATIVES = 32
"""Most likely tokens whose probabilities are kept at each step of an answer; the others count as one."""
LEFT_OVER = 1e-6
"""Least that those others share."""


@dataclass(frozen=True)
class Watched:
    """Questions and what the model made of them.

    visual [pictures, tokens, width]; and by question: picture [n]; later [n], whether it follows another one in its chat; words
    [n, most], what a router reads; head [n], tokens before the picture; text [n, most], the prompt without its picture; answer
    [n, most], the model's own; alternatives [n, most, k] tokens and likely [n, most, k + 1] log-probabilities, all others' together
    last; gaze [n, tokens]; costs [n, layers]. Behind the last token of a row stand -1; costs that were not measured are NaN.
    """

    visual: Tensor
    picture: Tensor
    later: Tensor
    words: Tensor
    head: Tensor
    text: Tensor
    answer: Tensor
    alternatives: Tensor
    likely: Tensor
    gaze: Tensor
    costs: Tensor

    def of(self, questions: Tensor) -> Watched:
        """Those questions alone; pictures stay."""
        parts = {name: part if name == "visual" else part[questions] for name, part in vars(self).items()}
        return Watched(**parts)


def watch(lesson: Lesson, source: Checkpoint, work: RunState, progress: Progress) -> Watched:
    """Watch every picture of a lesson. What is on disk already is not watched again."""
    task = progress.add_task("watching", total=lesson.pictures)
    found: list[dict[str, Tensor]] = []
    # Not the pictures that masks were made on.
    samples = read(lesson.data, lesson.pictures, lesson.seed + 1000, answered=False)
    for number in range(0, lesson.pictures, CHUNK):
        here = list(islice(samples, CHUNK))
        stored = work.read_tensors(f"watched-{number}")
        if stored is None:
            work.write_tensors(f"watched-{number}", _watch(lesson, source, here, number), {})
            stored = work.read_tensors(f"watched-{number}")
        assert stored is not None
        found.append(stored[0] | {"picture": stored[0]["picture"] + number})
        progress.advance(task, len(here))
    return Watched(**{name: _rows([row for chunk in found for row in chunk[name]]) for name in found[0]})


def _rows(parts: list[Tensor]) -> Tensor:
    """One below the other, all as long as the longest."""
    return torch.stack(parts) if parts[0].dim() == 0 else pad_sequence(parts, batch_first=True, padding_value=-1)


@torch.inference_mode()
def _watch(lesson: Lesson, source: Checkpoint, samples: Iterable[Sample], first: int) -> dict[str, Tensor]:
    found: list[dict[str, Tensor]] = []
    visual = []
    for number, sample in enumerate(samples):
        pixels = source.preprocessor.pixels(sample.image)[None].to(source.model.device, source.model.dtype)
        visual.append(source.model.vision(pixels).tokens[0])
        turns = Random(f"{lesson.seed}/{first + number}").sample(sample.turns, min(lesson.questions, len(sample.turns)))
        alone, later = _split([question for question, _ in turns], held_out=first + number >= lesson.taught)
        asked, made = _talk(lesson, source, visual[-1], alone, later)
        seen = _observe(source, asked, made, costly=(first + number) % COSTLY == 0)
        for place, one in enumerate(seen):
            found.append({"picture": torch.tensor(number), "later": torch.tensor(place >= len(alone)), **one})
    return {"visual": torch.stack(visual), **{name: _rows([one[name] for one in found]) for name in found[0]}}


def _split(questions: list[str], *, held_out: bool) -> tuple[list[str], list[str]]:
    """Those that are asked in chats of their own, and those that follow them, one each.

    Of a picture to learn from a quarter follow. Of one to judge by all are asked alone and all but the first once more: each kind
    has its own price (see `judge`), and what foresees their answers must know both.
    """
    if held_out:
        return questions, questions[1:]
    alone = len(questions) - len(questions) // SECOND
    return questions[:alone], questions[alone:]


def _talk(
    lesson: Lesson, source: Checkpoint, visual: Tensor, alone: list[str], later: list[str]
) -> tuple[list[Asked], list[list[int]]]:
    """Both kinds one after the other, with the model's own answers."""
    model, preprocessor = source.model, source.preprocessor
    asked = [Asked(preprocessor.question(text), visual) for text in alone]
    made = answers(model, asked, source.eos, lesson.answer)
    spoken = [preprocessor.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in made]
    chats = [[turn] for turn in zip(alone, spoken, strict=True)]
    then = [Asked(preprocessor.question(text, chat), visual) for text, chat in zip(later, chats, strict=False)]
    return asked + then, made + answers(model, then, source.eos, lesson.answer)


def _observe(source: Checkpoint, asked: list[Asked], made: list[list[int]], *, costly: bool) -> list[dict[str, Tensor]]:
    model, image = source.model, source.model.config.image_token_id
    dense, looks = observe(model, asked, made)
    costs = passing_costs(model, asked, made, dense) if costly else torch.full((len(asked), model.num_layers), torch.nan)
    found = []
    for one, answer, own, look, cost in zip(asked, made, dense, looks, costs, strict=True):
        likely, alternatives = own.topk(min(ALTERNATIVES, own.shape[-1] - 1))
        rest = torch.log1p(-likely.exp().sum(-1, keepdim=True).clamp_max(1 - LEFT_OVER))
        found.append({
            "head": torch.tensor(one.prompt.index(image)), "words": torch.tensor(words(one.prompt, image)),
            "text": torch.tensor([token for token in one.prompt if token != image]), "answer": torch.tensor(answer),
            "alternatives": alternatives.int(), "likely": torch.cat([likely, rest], -1), "gaze": look,
            "costs": cost,
        })  # fmt: skip
    return found
