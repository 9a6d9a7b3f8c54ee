"""Ask the un-pruned model about pictures, and keep what the router is to predict."""

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
from pruning.answers import Prompt, generate
from pruning.dynamic.router import text_window
from pruning.dynamic.training.config import TrainingConfig
from pruning.dynamic.training.teacher import freezing_costs, observe
from pruning.samples import Sample, read

CHUNK = 8
"""Pictures between two saves."""
COSTS_EVERY = 3
"""Of one in so many pictures the cost of freezing layers is measured."""
COSTLY_LAYERS = 6
"""Layers of which it is measured, drawn for each picture; each takes a pass. The first and the last always run."""
FOLLOW_UP_EVERY = 4
"""One in so many questions that are learned from follows another one in its chat."""
ALTERNATIVES = 32
"""Most likely tokens whose probabilities are kept at each step of an answer; the others count as one."""
MIN_REST = 1e-6
"""Least probability that those others share."""


@dataclass(frozen=True)
class RouterDataset:
    """Questions and what the model made of them.

    visual [pictures, tokens, width]; and by question: picture [n]; follow_up [n], whether it follows an answer in its chat; text
    [n, most], what a router reads; prompt [n, most], the prompt without its picture; image_start [n], tokens before the picture;
    answer [n, most], the model's own; top_tokens [n, most, k] and log_probabilities [n, most, k + 1], all others' together last;
    attention [n, tokens]; freezing_costs [n, layers], NaN where they were not measured. Behind the last token of a row stand -1.
    """

    visual: Tensor
    picture: Tensor
    follow_up: Tensor
    text: Tensor
    prompt: Tensor
    image_start: Tensor
    answer: Tensor
    top_tokens: Tensor
    log_probabilities: Tensor
    attention: Tensor
    freezing_costs: Tensor

    def of(self, questions: Tensor) -> RouterDataset:
        """Those questions alone; pictures stay."""
        parts = {name: part if name == "visual" else part[questions] for name, part in vars(self).items()}
        return RouterDataset(**parts)

    def example(self, question: int, image_token: int) -> tuple[Prompt, list[int], list[int]]:
        """A question's prompt, the text that the router reads of it, and the answer."""
        prompt, text, answer = (
            [token for token in part[question].tolist() if token >= 0] for part in (self.prompt, self.text, self.answer)
        )
        start = int(self.image_start[question])
        ids = [*prompt[:start], *[image_token] * self.attention.shape[1], *prompt[start:]]
        return Prompt(ids, self.visual[self.picture[question]]), text, answer


def collect(config: TrainingConfig, source: Checkpoint, state: RunState, progress: Progress) -> RouterDataset:
    """Ask about every picture. What is on disk already is not asked again."""
    task = progress.add_task("asking", total=config.pictures)
    found: list[dict[str, Tensor]] = []
    samples = read(config.data, config.pictures, config.picture_seed, answered=False)
    for number in range(0, config.pictures, CHUNK):
        here = list(islice(samples, CHUNK))
        stored = state.read_tensors(f"pictures-{number}")
        if stored is None:
            state.write_tensors(f"pictures-{number}", _collect(config, source, here, number), {})
            stored = state.read_tensors(f"pictures-{number}")
        assert stored is not None
        found.append(stored[0] | {"picture": stored[0]["picture"] + number})
        progress.advance(task, len(here))
    return RouterDataset(**{name: _stack([row for chunk in found for row in chunk[name]]) for name in found[0]})


def _stack(parts: list[Tensor]) -> Tensor:
    """One below the other, all as long as the longest."""
    return torch.stack(parts) if parts[0].dim() == 0 else pad_sequence(parts, batch_first=True, padding_value=-1)


@torch.inference_mode()
def _collect(config: TrainingConfig, source: Checkpoint, samples: Iterable[Sample], first: int) -> dict[str, Tensor]:
    found: list[dict[str, Tensor]] = []
    visual = []
    for number, sample in enumerate(samples):
        picture = source.preprocessor.picture(sample.image)
        visual.append(source.model.encode(picture.pixels, picture.layout).tokens[0])
        turns = Random(f"{config.seed}/{first + number}").sample(sample.turns, min(config.questions, len(sample.turns)))
        held_out = first + number >= config.training_pictures
        openings, follow_ups = _split([question for question, _ in turns], held_out=held_out)
        prompts, answers = _chats(config, source, visual[-1], openings, follow_ups)
        measured = _measure(source, prompts, answers, _costly_layers(config, first + number, source.model.num_layers))
        for place, one in enumerate(measured):
            found.append({"picture": torch.tensor(number), "follow_up": torch.tensor(place >= len(openings)), **one})
    return {"visual": torch.stack(visual), **{name: _stack([one[name] for one in found]) for name in found[0]}}


def _split(questions: list[str], *, held_out: bool) -> tuple[list[str], list[str]]:
    """Those that open a chat, and those that follow them, one each.

    Of a picture to learn from a quarter follow. Of one that is held out all open a chat and all but the first are asked once more:
    the agreement head must know both kinds, and level `auto` has a cost weight for each.
    """
    if held_out:
        return questions, questions[1:]
    openings = len(questions) - len(questions) // FOLLOW_UP_EVERY
    return questions[:openings], questions[openings:]


def _chats(
    config: TrainingConfig, source: Checkpoint, visual: Tensor, openings: list[str], follow_ups: list[str]
) -> tuple[list[Prompt], list[list[int]]]:
    """Both kinds one after the other, with the model's own answers."""
    model, preprocessor = source.model, source.preprocessor
    first = [Prompt(preprocessor.question(text), visual) for text in openings]
    answers = generate(model, first, source.eos, config.answer_tokens)
    spoken = [preprocessor.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    chats = [[turn] for turn in zip(openings, spoken, strict=True)]
    second = [Prompt(preprocessor.question(text, chat), visual) for text, chat in zip(follow_ups, chats, strict=False)]
    return first + second, answers + generate(model, second, source.eos, config.answer_tokens)


def _costly_layers(config: TrainingConfig, number: int, layers: int) -> list[int]:
    """Those whose freezing is measured on a picture."""
    inner = range(1, layers - 1)
    if number % COSTS_EVERY:
        return []
    return Random(f"layers {config.seed}/{number}").sample(inner, min(COSTLY_LAYERS, len(inner)))


def _measure(source: Checkpoint, prompts: list[Prompt], answers: list[list[int]], layers: list[int]) -> list[dict[str, Tensor]]:
    model, image = source.model, source.model.config.image_token_id
    dense, attention = observe(model, prompts, answers)
    freezing = freezing_costs(model, prompts, answers, dense, layers)
    found = []
    for number, (prompt, answer, own) in enumerate(zip(prompts, answers, dense, strict=True)):
        likely, top = own.topk(min(ALTERNATIVES, own.shape[-1] - 1))
        rest = torch.log1p(-likely.exp().sum(-1, keepdim=True).clamp_max(1 - MIN_REST))
        found.append({
            "text": torch.tensor(text_window(prompt.ids, image)),
            "prompt": torch.tensor([token for token in prompt.ids if token != image]),
            "image_start": torch.tensor(prompt.ids.index(image)), "answer": torch.tensor(answer),
            "top_tokens": top.int(), "log_probabilities": torch.cat([likely, rest], -1),
            "attention": attention[number], "freezing_costs": freezing[number],
        })  # fmt: skip
    return found
