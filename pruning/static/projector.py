"""Tune the vision projector so that the best policies of a search do well: EfficientLLaVA's search-space evolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from pruning.static.database import Policy, PolicyLoader
from pruning.static.fitness import Divergence


@dataclass(frozen=True)
class TuningConfig:
    """steps of AdamW; the share `held_out` of the samples is never trained on and decides."""

    steps: int = 48
    learning_rate: float = 1e-4
    batch_size: int = 8
    held_out: float = 0.25


@dataclass(frozen=True)
class Tuning:
    before: float  # mean divergence over the policies on the held-out samples
    after: float

    @property
    def accepted(self) -> bool:
        return self.after < self.before


def tune(
    divergence: Divergence, loader: PolicyLoader, policies: Sequence[Policy], config: TuningConfig, seed: int, turn: int
) -> Tuning:
    """Lower the mean divergence over `policies`, one of them a step, and keep the projector only if held-out samples agree.

    The teacher is the dense model. (Equation 6 of EfficientLLaVA says what is minimised; optimiser, steps and the held-out check
    are ours.)
    """
    projector = divergence.model.model.multi_modal_projector
    rng = Random(f"{seed}/{turn}")
    # The same in every turn: a sample that one turn was trained on cannot decide for the next.
    order = Random(f"{seed}/held out").sample(range(len(divergence.references)), len(divergence.references))
    cut = max(1, round(len(order) * config.held_out))
    held_out, trained = order[:cut], order[cut:]

    def held_out_divergence() -> float:
        found = []
        for policy in policies:
            loader.load(policy)
            with torch.no_grad():
                found.append(float(divergence(held_out).mean()))
        return sum(found) / len(found)

    before = held_out_divergence()
    untuned = {name: value.clone() for name, value in projector.state_dict().items()}
    # AdamW's small steps vanish in bfloat16: float32 copies are trained and written back after each step.
    pairs = [(p, p.detach().float().clone()) for p in projector.parameters()]
    optimizer = torch.optim.AdamW([copy for _, copy in pairs], lr=config.learning_rate, weight_decay=0.0)
    for parameter, _ in pairs:
        parameter.requires_grad_(True)
    for _ in range(config.steps):
        loader.load(rng.choice(policies))
        gradients = _gradients(divergence, rng.sample(trained, min(config.batch_size, len(trained))))
        with torch.no_grad():
            for (_, copy), gradient in zip(pairs, gradients, strict=True):
                copy.grad = gradient.float()
            optimizer.step()
            for parameter, copy in pairs:
                parameter.copy_(copy)
    for parameter, _ in pairs:
        parameter.requires_grad_(False)
    tuning = Tuning(before, held_out_divergence())
    if not tuning.accepted:
        projector.load_state_dict(untuned)
    return tuning


def _gradients(divergence: Divergence, indices: Sequence[int]) -> Sequence[Tensor]:
    """Of the mean divergence over these samples by the projector's parameters: one sample's activations are in memory at a time."""
    parameters = [*divergence.model.model.multi_modal_projector.parameters()]
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for index in reversed(indices):
        loss = divergence([index]).sum() / len(indices)
        for summed, gradient in zip(total, torch.autograd.grad(loss, parameters), strict=True):
            summed += gradient
    return total
