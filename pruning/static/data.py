"""Calibration samples: pictures with a question and its answer, from the embedded world or from a file in LLaVA's format."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
    ids: Tensor  # [n] int64: the prompt with image tokens expanded, then the answer
    pixels: Tensor  # [1, 3, height, width] float32
    answer: int  # how many of the last ids are the answer

    def inputs(self, model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
        """Arguments of the transformers model."""
        return {"input_ids": self.ids[None].to(model.device), "pixel_values": self.pixels.to(model.device, model.dtype)}


def embedded_world(
    preprocessor: Preprocessor, count: int, seed: int, split: str = "train", families: Sequence[str] = world.FAMILIES
) -> list[Sample]:
    """One question each to `count` pictures of the world, its families in turn."""
    found = []
    for i in range(count):
        index = seed * 1_000_000 + i
        scene = world.draw(split, index, families[i % len(families)])
        question = Random(f"calibration/{split}/{index}").choice(scene.questions)
        found.append(_sample(preprocessor, scene.image, question.text, question.answer))
    return found


def from_file(preprocessor: Preprocessor, path: Path, count: int, seed: int) -> list[Sample]:
    """`count` samples, drawn without repetition, of a JSONL file of {"image", "question", "answer"}, or of LLaVA's own
    {"image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}, of which the first turn is used.

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
            human, assistant = (turn["value"] for turn in entry["conversations"][:2])
            question, answer = human.replace("<image>", "").strip(), assistant
        else:
            question, answer = entry["question"].replace("<image>", "").strip(), entry["answer"]
        with Image.open(path.parent / entry["image"]) as image:
            return _sample(preprocessor, image.convert("RGB"), question, answer)
    except (ValueError, LookupError, TypeError, AttributeError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}") from error


def _sample(preprocessor: Preprocessor, image: Image.Image, question: str, answer: str) -> Sample:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    tokenizer = preprocessor.tokenizer
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    answered = tokenizer(f" {answer}", add_special_tokens=False).input_ids + end
    ids = torch.tensor(preprocessor.prompt(messages) + answered)
    return Sample(ids, preprocessor.pixels(image)[None], len(answered))
