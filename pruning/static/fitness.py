"""How far a pruned model is from the dense one: divergence on the answers of proxy samples, plus the structural-risk term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from pruning.static.data import Sample
from pruning.static.database import Database, Policy


@dataclass(frozen=True)
class Reference:
    """What a proxy sample is compared with: the tower's output, which the search leaves alone, and the dense model's answer."""

    sample: Sample
    seen: Tensor  # [visual tokens, width]: what the projector reads
    dense: Tensor  # [answer tokens, vocab] float32: log-probabilities


class Proxy:
    """A model and the references that it is compared with."""

    def __init__(self, model: LlavaForConditionalGeneration, references: Sequence[Reference]) -> None:
        self.model, self.references = model, references

    @classmethod
    @torch.no_grad()
    def of(cls, model: LlavaForConditionalGeneration, samples: Sequence[Sample]) -> Proxy:
        """The model, dense as it is now, becomes the reference."""
        references = []
        for sample in samples:
            seen = _tower_output(model, sample)
            references.append(Reference(sample, seen, _logits(model, sample, seen).log_softmax(-1)))
        return cls(model, references)

    def with_tower(self) -> Proxy:
        """The same references, seen by the vision tower as it is now."""
        return Proxy(self.model, [replace(r, seen=_tower_output(self.model, r.sample)) for r in self.references])

    def divergences(self, which: Sequence[int]) -> Tensor:
        """Mean KL(dense || model) over the answer tokens of each sample in `which`: float32 [samples]. Differentiable."""
        return torch.stack([self._divergence(self.references[i]) for i in which])

    def _divergence(self, reference: Reference) -> Tensor:
        logits = _logits(self.model, reference.sample, reference.seen)
        return F.kl_div(logits.log_softmax(-1), reference.dense, reduction="none", log_target=True).sum(-1).mean()


def _logits(model: LlavaForConditionalGeneration, sample: Sample, seen: Tensor) -> Tensor:
    """float32 [answer tokens, vocab]. One sample at a time: on CPU, batches of long rows are half as fast."""
    inputs = sample.text(model)
    ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(ids)
    places = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    embeds = embeds.masked_scatter(places, model.model.multi_modal_projector(seen[None]).to(embeds.dtype))
    out = model.model.language_model(inputs_embeds=embeds, **inputs, use_cache=False).last_hidden_state
    return model.lm_head(out[0, sample.before_answers.to(out.device)]).float()


@torch.no_grad()
def _tower_output(model: LlavaForConditionalGeneration, sample: Sample) -> Tensor:
    """What the projector reads: [visual tokens, width]."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].detach()[0])

    handle = model.model.multi_modal_projector.register_forward_pre_hook(keep)
    try:
        model.model.get_image_features(pixel_values=sample.pixels.to(model.device, model.dtype))
    finally:
        handle.remove()
    return seen[0]


class Risk:
    """The structural-risk term R of a policy: the mean over weights of their matrix's ||W pruned - W dense||² / ||W dense||².

    EfficientLLaVA (Liang et al. 2025, arXiv 2503.15369, equation 4) bounds the generalisation error by norms of the weights and
    does not say which. Ours is measured from the dense weights, which no proxy sample has chosen, as in bounds by the distance
    from a reference (Neyshabur et al. 2019, arXiv 1805.12076); the plain norm was tried and made things worse (docs/log.md).
    """

    def __init__(self, database: Database) -> None:
        sizes = {name: database.weight(name, None).numel() for name in database.names}
        total = sum(sizes.values())
        self._table = {(name, level): part * sizes[name] / total for (name, level), part in database.distances().items()}
        self._names = database.names

    def __call__(self, policy: Policy) -> float:
        return sum(self._table[pair] for pair in zip(self._names, policy, strict=True))
