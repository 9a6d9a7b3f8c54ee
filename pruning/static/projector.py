"""Tune the vision projector so that the best policies of a search do well: EfficientLLaVA's search-space evolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from pruning.static.database import Installed, Policy
from pruning.static.fitness import Proxy


@dataclass(frozen=True)
class Tuning:
    """steps of AdamW at `rate`; `held_out` of the proxy samples are never trained on and decide."""

    steps: int = 48
    rate: float = 1e-4
    batch: int = 8
    held_out: float = 0.25


@dataclass(frozen=True)
class Outcome:
    before: float  # mean divergence over the policies on the held-out samples
    after: float

    @property
    def accepted(self) -> bool:
        return self.after < self.before


def tune(proxy: Proxy, installed: Installed, policies: Sequence[Policy], tuning: Tuning, seed: int, turn: int) -> Outcome:
    """Lower the mean divergence over `policies`, one of them a step, and keep the projector only if held-out samples agree.

    The teacher stays the dense model. (Equation 6 of EfficientLLaVA says what is
    minimised; optimiser, steps and gate are ours.)
    """
    projector = proxy.model.model.multi_modal_projector
    rng = Random(f"{seed}/{turn}")
    # The same in every turn: what one turn was trained on cannot judge the next.
    order = Random(f"{seed}/held out").sample(range(len(proxy.references)), len(proxy.references))
    cut = max(1, round(len(order) * tuning.held_out))
    held_out, trained = order[:cut], order[cut:]

    def judge() -> float:
        found = []
        for policy in policies:
            installed.install(policy)
            with torch.no_grad():
                found.append(float(proxy.divergences(held_out).mean()))
        return sum(found) / len(found)

    before = judge()
    kept = {name: value.clone() for name, value in projector.state_dict().items()}
    # AdamW's small steps vanish in bfloat16: float32 copies are trained and written back after each step.
    pairs = [(p, p.detach().float().clone()) for p in projector.parameters()]
    optimizer = torch.optim.AdamW([copy for _, copy in pairs], lr=tuning.rate, weight_decay=0.0)
    for parameter, _ in pairs:
        parameter.requires_grad_(True)
    for _ in range(tuning.steps):
        installed.install(rng.choice(policies))
        loss = proxy.divergences(rng.sample(trained, min(tuning.batch, len(trained)))).mean()
        gradients: Sequence[Tensor] = torch.autograd.grad(loss, [parameter for parameter, _ in pairs])
        with torch.no_grad():
            for (_, copy), gradient in zip(pairs, gradients, strict=True):
                copy.grad = gradient.float()
            optimizer.step()
            for parameter, copy in pairs:
                parameter.copy_(copy)
    for parameter, _ in pairs:
        parameter.requires_grad_(False)
    outcome = Outcome(before, judge())
    if not outcome.accepted:
        projector.load_state_dict(kept)
    return outcome
