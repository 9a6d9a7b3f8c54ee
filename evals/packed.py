"""Exact match of all of a picture's questions in one pass, for comparing many checkpoints: a tenth of an exam's time.

Greedy decoding answers a question right if and only if every token of the right answer is the most likely one after those before
it; so one forward over the right answers tells. All questions about a picture share its rows (models.embedded.data). An interval
draws pictures, not questions, for those about one picture fail together.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerFast

from models.embedded.data import IGNORE, Mix, Packer
from models.embedded.world import FAMILIES, Scene, draw
from models.preprocess import Preprocessor

BATCH = 8
RESAMPLES = 1000


def exam(
    model: LlavaForConditionalGeneration, preprocessor: Preprocessor, pictures: int, split: str = "test"
) -> dict[str, list[list[bool]]]:
    """Whether each question of each picture is answered right, by family; `pictures` of the split, families in turn."""
    found: dict[str, list[list[bool]]] = {family: [] for family in FAMILIES}
    for first in range(0, pictures, BATCH):
        scenes = [draw(split, index) for index in range(first, min(first + BATCH, pictures))]
        for scene, right in zip(scenes, _answers(model, preprocessor, scenes), strict=True):
            found[scene.family].append(right)
    return found


@torch.inference_mode()
def _answers(model: LlavaForConditionalGeneration, preprocessor: Preprocessor, scenes: Sequence[Scene]) -> list[list[bool]]:
    tokenizer = preprocessor.tokenizer
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    packer = Packer(tokenizer, preprocessor.visual_tokens_per_image)
    rows = [packer.rows(list(scene.questions), Mix(rows=4096, long=0), Random(0)) for scene in scenes]
    longest = max(int((row["segments"] >= 0).sum()) for row in rows)
    batch = {key: torch.from_numpy(np.stack([row[key][:longest] for row in rows])) for key in rows[0]}
    pixels = torch.stack([preprocessor.pixels(scene.image) for scene in scenes]).to(model.dtype)
    ids, segments, labels = batch["ids"], batch["segments"], batch["labels"][:, 1:]
    embeds = model.get_input_embeddings()(ids)
    features = torch.stack(list(model.model.get_image_features(pixel_values=pixels).pooler_output))
    embeds[:, packer.first_visual : packer.first_visual + packer.visual_tokens] = features.to(embeds.dtype)
    out = model.model.language_model(
        inputs_embeds=embeds, position_ids=batch["positions"], attention_mask=_mask(segments, model.dtype), use_cache=False
    ).last_hidden_state
    right = (model.lm_head(out[:, :-1]).argmax(-1) == labels) | (labels == IGNORE)
    talks = segments[:, 1:]
    return [[bool(right[i][talks[i] == talk + 1].all()) for talk in range(len(s.questions))] for i, s in enumerate(scenes)]


def _mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Each conversation sees the picture and itself: additive [B, 1, n, n]."""
    order = torch.arange(segments.shape[1])
    same = (segments[:, :, None] == segments[:, None, :]) | (segments[:, None, :] == 0)
    visible = (same & (order[:, None] >= order[None, :]))[:, None]
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


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
