"""Evolutionary search for the policy that leaves a checkpoint closest to dense at an exact total (EfficientLLaVA-style).

What EfficientLLaVA's text fixes: fitness on 64 proxy samples is a task term plus η times a norm term of the pruned weights, and the
search alternates with tuning the projector on the mean loss of its best policies. What it leaves open is designed here: levels and
switches as in EvoPress, selection in stages on growing samples, and η in units of the spread of both terms.
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
"""Mean divergence of each policy over the proxy samples given by number."""
OVERFLOW = 1e30
SPREAD = 24
"""Policies from which the spread of both terms of the fitness is read."""


@dataclass(frozen=True)
class Plan:
    """offspring a generation; (samples, survivors) of each stage but the last, which sees all; how many of the best are `top`."""

    generations: int = 40
    offspring: int = 16
    stages: tuple[tuple[int, int], ...] = ((3, 5), (10, 1))
    eta: float = 0.3
    top: int = 4


@dataclass
class State:
    """All that a search needs to go on: written after every generation."""

    generation: int
    parent: Policy
    scale: float  # η times the ratio of both terms' spreads: what the risk term is multiplied with
    best: list[tuple[float, Policy]] = field(default_factory=list)  # fitness on all samples, best first
    history: list[dict[str, float]] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> State:
        best = [(float(fitness), tuple(policy)) for fitness, policy in document["best"]]
        return cls(**{**document, "parent": tuple(document["parent"]), "best": best})


class Search:
    def __init__(
        self, limits: Sequence[tuple[int, int]], samples: int, plan: Plan, seed: int, evaluate: Evaluate,
        risk: Callable[[Policy], float],
    ) -> None:  # fmt: skip
        self._limits, self._samples, self._plan, self._seed = list(limits), samples, plan, seed
        self._evaluate, self._risk = evaluate, risk

    def start(self) -> State:
        """The uniform policy, and the scale of the risk term."""
        parent = (0,) * len(self._limits)
        return State(0, parent, self._plan.eta * self._ratio_of_spreads(parent) if self._plan.eta else 0.0)

    def advance(self, state: State) -> State:
        """One generation. Its choices depend on the seed and its number: a search that goes on ends as one that never stopped."""
        rng = Random(f"{self._seed}/{state.generation}")
        children: list[Policy] = []
        for _ in range(10 * self._plan.offspring):  # a small space has few neighbours: duplicates may leave fewer
            child = self._mutate(state.parent, rng, min(rng.randint(1, 3), rng.randint(1, 3)))
            if child != state.parent and child not in children:
                children.append(child)
            if len(children) == self._plan.offspring:
                break
        for samples, survivors in self._plan.stages:
            chosen = rng.sample(range(self._samples), min(samples, self._samples))
            fitness = self._fitness(children, chosen, state.scale)
            children = [child for _, child in sorted(zip(fitness, children, strict=True))[:survivors]]
        # The parent stands in the last stage alone, where a child must beat it on all samples.
        known = {policy: value for value, policy in state.best}
        new = [policy for policy in (state.parent, *children) if policy not in known]
        known |= zip(new, self._fitness(new, range(self._samples), state.scale), strict=True)
        best = sorted((value, policy) for policy, value in known.items())[: self._plan.top]
        lowest, parent = best[0]
        risk = self._risk(parent)
        entry = {"fitness": lowest, "divergence": lowest - state.scale * risk, "risk": risk}
        return State(state.generation + 1, parent, state.scale, best, [*state.history, entry])

    def _ratio_of_spreads(self, parent: Policy) -> float:
        """Of divergence and risk: interquartile ranges over policies a few switches from `parent`, as evolution meets them.

        Ranges, because a matrix that loses nearly all can diverge a thousand times as far as the others.
        """
        rng = Random(f"{self._seed}/spread")
        policies = [self._mutate(parent, rng, rng.randint(1, 8)) for _ in range(SPREAD)]
        divergence = self._evaluate(policies, range(min(self._plan.stages[-1][0], self._samples)))
        spread = _range([self._risk(policy) for policy in policies])
        return _range([_finite(d) for d in divergence]) / spread if spread else 0.0

    def _fitness(self, policies: Sequence[Policy], samples: Sequence[int], scale: float) -> list[float]:
        divergence = self._evaluate(policies, samples)
        return [_finite(d + scale * self._risk(policy)) for d, policy in zip(divergence, policies, strict=True)]

    def _mutate(self, policy: Policy, rng: Random, switches: int) -> Policy:
        """So many times, one matrix a level up and another one down."""
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


def _range(values: Sequence[float]) -> float:
    """Interquartile."""
    low, _, high = quantiles(values, n=4)
    return high - low


def _finite(fitness: float) -> float:
    """An overflow is the worst of all; NaN would be neither better nor worse than anything."""
    return fitness if isfinite(fitness) else OVERFLOW
