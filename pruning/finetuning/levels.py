"""A sample as a level shows it: each picture merged into fewer visual tokens, as where there is no router."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.vision.features import ImageFeatures
from pruning.dynamic.levels import SIZES, OperatingPoint
from pruning.dynamic.planner import make_route
from pruning.static.fitness import embedded
from pruning.static.packing import PackedSample

RATIOS = {name: ratio for name, ratio, _ in SIZES}


@dataclass(frozen=True)
class Shown:
    """Arguments of the language model, and the rows whose logits say the answers' tokens: int64 [answer tokens]."""

    inputs: dict[str, Tensor]
    before_answers: Tensor


def shown(model: PreTrainedModel, sample: PackedSample, features: Tensor, level: str) -> Shown:
    """What the language model is given of a sample at a level; `features` are what the projector reads. No layer is skipped."""
    inputs = embedded(model, sample, features)
    embeds, places = inputs["inputs_embeds"], (sample.ids == model.config.image_token_id).nonzero()[:, 0]
    image = ImageFeatures(embeds[:, places], layout=sample.picture.layout)
    route, visual = make_route(OperatingPoint(visual_ratio=RATIOS[level]), [image], 1, None)
    if visual is None or not route.dropped:
        return Shown(inputs, sample.before_answers)
    stay = places[list(route.kept_tokens)]
    rows = torch.ones(len(sample.ids), dtype=torch.bool)
    rows[places] = False
    rows[stay] = True
    bias = torch.zeros(len(rows))  # attention counts a merged token as often as the tokens it stands for
    bias[stay] = torch.tensor(route.token_sizes).log()
    mask = inputs["attention_mask"] + bias.to(inputs["attention_mask"])
    embeds = embeds.index_copy(1, places.to(embeds.device), visual[None])
    kept = rows.nonzero()[:, 0].to(embeds.device)
    given = {
        "inputs_embeds": embeds[:, kept], "position_ids": inputs["position_ids"][:, kept],
        "attention_mask": mask[:, :, kept][..., kept],
    }  # fmt: skip
    return Shown(given, (rows.cumsum(0) - 1)[sample.before_answers])
