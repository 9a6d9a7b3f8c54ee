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

BATCH = 16


@dataclass(frozen=True)
class Reference:
    """What a proxy sample is compared with: the tower's output, which the search leaves alone, and the dense model's answer."""

    sample: Sample
    seen: Tensor  # [visual tokens, width]: what the projector reads
    dense: Tensor  # [answer, vocab] float32: log-probabilities


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
            (logits,) = cls(model, [Reference(sample, seen, seen)])._logits([0])
            references.append(Reference(sample, seen, logits.log_softmax(-1)))
        return cls(model, references)

    def with_tower(self) -> Proxy:
        """The same references, seen by the vision tower as it is now."""
        return Proxy(self.model, [replace(r, seen=_tower_output(self.model, r.sample)) for r in self.references])

    def divergences(self, which: Sequence[int]) -> Tensor:
        """Mean KL(dense || model) over the answer tokens of each sample in `which`: float32 [samples]. Differentiable."""
        parts = []
        for start in range(0, len(which), BATCH):
            chosen = which[start : start + BATCH]
            for i, logits in zip(chosen, self._logits(chosen), strict=True):
                each = F.kl_div(logits.log_softmax(-1), self.references[i].dense, reduction="none", log_target=True)
                parts.append(each.sum(-1).mean())
        return torch.stack(parts)

    def _logits(self, which: Sequence[int]) -> list[Tensor]:
        """float32 logits [answer, vocab] of each sample's answer tokens, from one right-padded batch."""
        model, chosen = self.model, [self.references[i].sample for i in which]
        longest = max(len(s.ids) for s in chosen)
        ids = torch.stack([F.pad(s.ids, (0, longest - len(s.ids))) for s in chosen]).to(model.device)
        lengths = torch.tensor([len(s.ids) for s in chosen], device=model.device)
        mask = (torch.arange(longest, device=model.device) < lengths[:, None]).long()
        visual = model.model.multi_modal_projector(torch.stack([self.references[i].seen for i in which]))
        embeds = model.get_input_embeddings()(ids)
        places = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(places, visual.to(embeds.dtype))
        out = model.model.language_model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
        spans = [(len(s.ids) - s.answer - 1, len(s.ids) - 1) for s in chosen]
        return [model.lm_head(out[row, first:last]).float() for row, (first, last) in enumerate(spans)]


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
    """The structural-risk term R of a policy: the mean over matrices of ||W pruned||² / ||W dense||² (Frobenius).

    EfficientLLaVA (Liang et al. 2025, arXiv 2503.15369, equation 4) bounds the generalisation error by norms of the weights and
    does not say which; this one is ours.
    """

    def __init__(self, database: Database) -> None:
        norms = database.norms()
        self._table = {(name, level): norm / norms[name, None] for (name, level), norm in norms.items()}
        self._names = database.names

    def __call__(self, policy: Policy) -> float:
        return sum(self._table[pair] for pair in zip(self._names, policy, strict=True)) / len(policy)
