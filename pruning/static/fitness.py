"""The two terms of a policy's fitness: divergence from the dense model on the answers, and the structural risk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.families import arrange
from pruning.static.database import Database, Policy
from pruning.static.packing import PackedSample


@dataclass(frozen=True)
class Reference:
    """What the dense model makes of a sample."""

    sample: PackedSample
    image_features: Tensor  # [tiles, tokens of a tile, width]: what the projector reads; the search does not change it
    hidden: Tensor  # [answer tokens, width]: what the head reads; the search does not change the head either


class Divergence:
    """How far a model is from what the dense one said."""

    def __init__(self, model: PreTrainedModel, references: Sequence[Reference]) -> None:
        self.model, self.references = model, references

    @classmethod
    @torch.no_grad()
    def from_dense(cls, model: PreTrainedModel, samples: Sequence[PackedSample]) -> Divergence:
        """The model, dense as it is now, becomes the reference."""
        references = []
        for sample in samples:
            features = image_features(model, sample)
            hidden = answer_rows(model, embedded(model, sample, features), sample.before_answers)
            references.append(Reference(sample, features, hidden))
        return cls(model, references)

    def __call__(self, indices: Sequence[int]) -> Tensor:
        """Mean KL(dense || model) over the answer tokens of each of these samples: float32 [samples]. Differentiable."""
        return torch.stack([self._of_sample(self.references[i]) for i in indices])

    def _of_sample(self, reference: Reference) -> Tensor:
        inputs = embedded(self.model, reference.sample, reference.image_features)
        return divergence(self.model, reference.hidden, answer_rows(self.model, inputs, reference.sample.before_answers))


def divergence(model: PreTrainedModel, dense: Tensor, found: Tensor) -> Tensor:
    """Mean KL(dense || found) of what `model`'s head makes of rows [answer tokens, width]. Differentiable in `found`."""
    with torch.no_grad():
        wanted = _log_probs(model, dense)
    return F.kl_div(_log_probs(model, found), wanted, reduction="none", log_target=True).sum(-1).mean()


def _log_probs(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """float32 [answer tokens, vocab]. Made anew each time: kept, they would be larger than the model."""
    return model.lm_head(hidden).float().log_softmax(-1)


def embedded(model: PreTrainedModel, sample: PackedSample, features: Tensor) -> dict[str, Tensor]:
    """Arguments of the language model for one sample: on CPU, batches of long rows are half as fast."""
    inputs = sample.text(model)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    places = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    newline = model.model.image_newline if sample.picture.layout.newline else None
    visual = arrange(model.model.multi_modal_projector(features), sample.picture.layout, newline)
    return {**inputs, "inputs_embeds": embeds.masked_scatter(places, visual.to(embeds.dtype))}


def answer_rows(model: PreTrainedModel, inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
    """What the head reads in these rows, [rows, width]."""
    out = model.model.language_model(**inputs, use_cache=False).last_hidden_state
    return out[0, rows.to(out.device)]


@torch.no_grad()
def image_features(model: PreTrainedModel, sample: PackedSample) -> Tensor:
    """What the projector reads: [tiles, tokens of a tile, width]."""
    features: list[Tensor] = []

    def catch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        features.append(inputs[0].detach())

    handle = model.model.multi_modal_projector.register_forward_pre_hook(catch)
    try:
        model.model.get_image_features(**sample.image(model))
    finally:
        handle.remove()
    return features[0]


class StructuralRisk:
    """The structural-risk term R of a policy: the mean over weights of their matrix's ||W pruned - W dense||² / ||W dense||².

    EfficientLLaVA (Liang et al. 2025, arXiv 2503.15369, equation 4) bounds the generalisation error by norms of the weights and
    does not say which. Ours is measured from the dense weights, which no calibration sample has chosen, as in bounds by the
    distance from a reference (Neyshabur et al. 2019, arXiv 1805.12076); the plain norm was tried and made things worse
    (docs/log.md).
    """

    def __init__(self, database: Database) -> None:
        sizes = database.sizes
        total = sum(sizes.values())
        self._risks = {(name, level): part * sizes[name] / total for (name, level), part in database.distances().items()}
        self._names = database.names

    def __call__(self, policy: Policy) -> float:
        return sum(self._risks[pair] for pair in zip(self._names, policy, strict=True))
