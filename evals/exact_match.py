"""Exact match of all of a picture's questions in one pass, for comparing many checkpoints or routes: a tenth of an exam's time.

Greedy decoding gives an answer if and only if each of its tokens is the most likely one after those before it; so one forward over
the answer tells. For a checkpoint all questions about a picture share its rows (`pruning.static.packing`); for routes each has its
own. An interval draws pictures, not questions, for those about one picture fail together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from checkpoints import things, world
from models.llava import Llava
from models.preprocess import Preprocessor
from models.route import Route
from pruning.answers import Prompt
from pruning.dynamic.training.teacher import margins
from pruning.samples import FAMILIES, THINGS, WORLD, of_scene
from pruning.static.packing import PackedSample, pack

RESAMPLES = 1000
Scene = world.Scene | things.Scene
DRAW: dict[str, Callable[[str, int], Scene]] = {WORLD: world.draw, THINGS: things.draw}


def right_by_family(
    model: PreTrainedModel, preprocessor: Preprocessor, pictures: int, split: str = "test", data: str = WORLD
) -> dict[str, list[list[bool]]]:
    """Whether each question of each picture is answered right, by family; `pictures` of the split, families in turn.

    `data` says who draws, WORLD or THINGS. Of an answer with synonyms only the first wording counts.
    """
    found: dict[str, list[list[bool]]] = {family: [] for family in FAMILIES[data]}
    for index in range(pictures):
        scene = DRAW[data](split, index)
        found[scene.family].append(_answers(model, pack(preprocessor, of_scene(scene))))
    return found


@torch.inference_mode()
def _answers(model: PreTrainedModel, sample: PackedSample) -> list[bool]:
    wanted = sample.before_answers.to(model.device)
    said = model(**sample.inputs(model), logits_to_keep=wanted, use_cache=False).logits[0].argmax(-1).cpu()
    right, segments = said == sample.ids[sample.answers], sample.segments[sample.answers]
    return [bool(right[segments == segment].all()) for segment in range(1, int(sample.segments.max()) + 1)]


def matches(model: Llava, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], routes: Sequence[Route]) -> list[bool]:
    """Whether each answer is what greedy decoding gives on its route."""
    return [margin > 0 for margin in margins(model, prompts, answers, routes)]


def summary(found: dict[str, list[list[bool]]], seed: int = 0) -> dict[str, Any]:
    """Accuracy over all questions, each family's, and the 95 % bootstrap interval over pictures."""
    pictures = [right for family in found.values() for right in family]
    counts = np.array([[sum(right), len(right)] for right in pictures])
    drawn = np.random.default_rng(seed).integers(0, len(counts), (RESAMPLES, len(counts)))
    sums = counts[drawn].sum(1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], (0.025, 0.975))
    families = {name: _share(rights) for name, rights in found.items() if rights}
    return {
        "accuracy": round(_share(pictures), 4), "interval": [round(float(low), 4), round(float(high), 4)],
        "questions": int(counts[:, 1].sum()), "pictures": len(pictures),
        "families": {name: round(share, 4) for name, share in families.items()},
    }  # fmt: skip


def _share(pictures: Sequence[Sequence[bool]]) -> float:
    return sum(map(sum, pictures)) / sum(map(len, pictures))
