"""Evolutionary search for the policy that leaves a checkpoint closest to dense at an exact total (after EfficientLLaVA).

What EfficientLLaVA's text fixes: fitness on 64 samples is a task term plus η times a norm term of the pruned weights, and the
search alternates with tuning the projector on the mean loss of its best policies. What it leaves open is ours: levels and level
switches as in EvoPress, selection in stages on growing numbers of samples, and η in units of the spread of both terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from random import Random
from statistics import quantiles
from typing import Any

from pruning.static.database import Policy

Evaluate = Callable[[Sequence[Policy], Sequence[int]], list[float]]
"""Mean divergence of each policy over the samples with these indices."""
OVERFLOW = 1e30
SPREAD_POLICIES = 24
"""Policies from which the spread of both terms of the fitness is measured."""


@dataclass(frozen=True)
class EvolutionConfig:
    """stages: (samples, survivors) of each stage of selection but the last, which sees all samples; top: how many of the best
    policies are remembered, for the projector."""

    eta: float = 0.3
    generations: int = 40
    offspring: int = 16
    stages: tuple[tuple[int, int], ...] = ((3, 5), (10, 1))
    top: int = 4


@dataclass
class EvolutionState:
    """All that an evolution needs to go on: written after every generation."""

    generation: int
    parent: Policy
    risk_weight: float  # η times the ratio of both terms' spreads
    best: list[tuple[float, Policy]] = field(default_factory=list)  # fitness on all samples, best first
    history: list[dict[str, float]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> EvolutionState:
        best = [(float(fitness), tuple(policy)) for fitness, policy in document["best"]]
        return cls(**{**document, "parent": tuple(document["parent"]), "best": best})


class Evolution:
    """limits: the lowest and highest level of each matrix; samples: how many there are."""

    def __init__(
        self, limits: Sequence[tuple[int, int]], samples: int, config: EvolutionConfig, seed: int, evaluate: Evaluate,
        risk: Callable[[Policy], float],
    ) -> None:  # fmt: skip
        self._limits, self._samples, self._config, self._seed = list(limits), samples, config, seed
        self._evaluate, self._risk = evaluate, risk

    def start(self) -> EvolutionState:
        """The uniform policy, and the weight of the risk term."""
        parent = (0,) * len(self._limits)
        return EvolutionState(0, parent, self._config.eta * self._ratio_of_spreads(parent) if self._config.eta else 0.0)

    def step(self, state: EvolutionState) -> EvolutionState:
        """One generation. Its choices depend on the seed and its number: a search that goes on ends as one that never stopped."""
        rng = Random(f"{self._seed}/{state.generation}")
        offspring = self._offspring(state.parent, rng)
        for samples, survivors in self._config.stages:
            indices = rng.sample(range(self._samples), min(samples, self._samples))
            fitness = self._fitness(offspring, indices, state.risk_weight)
            offspring = [policy for _, policy in sorted(zip(fitness, offspring, strict=True))[:survivors]]
        # The parent takes part in the last stage alone, where a child must beat it on all samples.
        known = {policy: fitness for fitness, policy in state.best}
        new = [policy for policy in (state.parent, *offspring) if policy not in known]
        known |= zip(new, self._fitness(new, range(self._samples), state.risk_weight), strict=True)
        best = sorted((fitness, policy) for policy, fitness in known.items())[: self._config.top]
        lowest, parent = best[0]
        risk = self._risk(parent)
        entry = {"fitness": lowest, "divergence": lowest - state.risk_weight * risk, "risk": risk}
        return EvolutionState(state.generation + 1, parent, state.risk_weight, best, [*state.history, entry])

    def _offspring(self, parent: Policy, rng: Random) -> list[Policy]:
        offspring: list[Policy] = []
        for _ in range(10 * self._config.offspring):  # a small space has few neighbours: duplicates may leave fewer
            child = self._mutate(parent, rng, min(rng.randint(1, 3), rng.randint(1, 3)))
            if child != parent and child not in offspring:
                offspring.append(child)
            if len(offspring) == self._config.offspring:
                break
        return offspring

    def _ratio_of_spreads(self, parent: Policy) -> float:
        """Of divergence and risk: interquartile ranges over policies a few switches from `parent`, as evolution meets them.

        Ranges, because a matrix that loses nearly all can diverge a thousand times as far as the others.
        """
        rng = Random(f"{self._seed}/spread")
        policies = [self._mutate(parent, rng, rng.randint(1, 8)) for _ in range(SPREAD_POLICIES)]
        divergence = self._evaluate(policies, range(min(self._config.stages[-1][0], self._samples)))
        spread = _interquartile_range([self._risk(policy) for policy in policies])
        return _interquartile_range([_finite(d) for d in divergence]) / spread if spread else 0.0

    def _fitness(self, policies: Sequence[Policy], indices: Sequence[int], risk_weight: float) -> list[float]:
        divergence = self._evaluate(policies, indices)
        return [_finite(d + risk_weight * self._risk(policy)) for d, policy in zip(divergence, policies, strict=True)]

    def _mutate(self, policy: Policy, rng: Random, switches: int) -> Policy:
        """So many level switches: one matrix a level up and another one down."""
        levels = list(policy)
        for _ in range(switches):
            up = [i for i, (_, high) in enumerate(self._limits) if levels[i] < high]
            down = [i for i, (low, _) in enumerate(self._limits) if levels[i] > low]
            if not up or not down:
                break
            gains, loses = rng.choice(up), rng.choice(down)
            if gains != loses:
                levels[gains] += 1
                levels[loses] -= 1
        return tuple(levels)


def _interquartile_range(values: Sequence[float]) -> float:
    low, _, high = quantiles(values, n=4)
    return high - low


def _finite(fitness: float) -> float:
    """An overflow is the worst of all; NaN would be neither better nor worse than anything."""
    return fitness if isfinite(fitness) else OVERFLOW
