"""The evolution on fitness functions whose best policy is known."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.static.database import Policy, level_grid
from pruning.static.evolution import Evolution, EvolutionConfig, EvolutionState

LIMITS = [(-3, 3)] * 6
BEST: Policy = (3, -2, 1, 0, -3, 1)
QUICK = EvolutionConfig(generations=60, offspring=12, stages=((4, 4), (8, 2)), eta=0.0)


def distance(policies: Sequence[Policy], samples: Sequence[int]) -> list[float]:
    """Fitness that is least at BEST; few samples make it noisy."""
    noise = Random(str(sorted(samples)))
    return [sum((a - b) ** 2 for a, b in zip(p, BEST, strict=True)) + noise.random() / len(samples) for p in policies]


def go(evolution: Evolution, state: EvolutionState, generations: int) -> EvolutionState:
    for _ in range(generations):
        state = evolution.step(state)
    return state


def no_risk(policy: Policy) -> float:
    return 0.0


def test_it_finds_the_best_policy():
    evolution = Evolution(LIMITS, 16, QUICK, 0, distance, no_risk)
    assert go(evolution, evolution.start(), 60).parent == BEST


@given(st.lists(st.tuples(st.integers(-4, 0), st.integers(0, 4)), min_size=1, max_size=8), st.integers(0, 9))
def test_every_policy_keeps_the_total_and_the_limits(limits, seed):
    seen: list[Policy] = []

    def record(policies: Sequence[Policy], samples: Sequence[int]) -> list[float]:
        seen.extend(policies)
        return [Random(str(policy)).random() for policy in policies]

    evolution = Evolution(limits, 4, EvolutionConfig(offspring=4, stages=((2, 2),), eta=0.3), seed, record, lambda p: float(p[0]))
    go(evolution, evolution.start(), 3)
    assert seen
    for policy in seen:
        assert sum(policy) == 0
        assert all(low <= level <= high for level, (low, high) in zip(policy, limits, strict=True))


def test_fitness_never_rises():
    evolution = Evolution(LIMITS, 16, EvolutionConfig(stages=((16, 4),), eta=0.0), 1, distance, no_risk)
    history = [entry["fitness"] for entry in go(evolution, evolution.start(), 20).history]
    assert history == sorted(history, reverse=True)


def test_a_search_that_goes_on_ends_as_one_that_never_stopped():
    evolution = Evolution(LIMITS, 16, QUICK, 3, distance, no_risk)
    whole = go(evolution, evolution.start(), 20)
    half = go(evolution, evolution.start(), 11)
    assert go(evolution, EvolutionState.of(half.document()), 9) == whole


def test_risk_counts_in_units_of_the_spread_of_both_terms():
    def risk(policy: Policy) -> float:
        return 1000.0 * abs(policy[0])

    evolution = Evolution(LIMITS, 16, EvolutionConfig(eta=0.5), 0, distance, risk)
    doubled = Evolution(LIMITS, 16, EvolutionConfig(eta=1.0), 0, distance, risk)
    assert doubled.start().risk_weight == pytest.approx(2 * evolution.start().risk_weight)
    assert evolution.start().risk_weight < 0.1  # a term of thousands is brought to the size of the other
    strong = Evolution(LIMITS, 16, EvolutionConfig(offspring=12, eta=50.0), 0, distance, risk)
    assert go(strong, strong.start(), 30).parent[0] == 0, "the risk wins over the divergence, which wants 3"


def test_the_best_are_kept_in_order_for_the_projector():
    evolution = Evolution(LIMITS, 16, QUICK, 0, distance, no_risk)
    best = go(evolution, evolution.start(), 10).best
    assert len(best) == QUICK.top
    assert best == sorted(best)
    assert len({policy for _, policy in best}) == QUICK.top


@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(40, 4000), min_size=1), st.floats(0.1, 0.9), st.integers(1, 6))
def test_levels_stay_within_each_matrix(sizes, sparsity, levels):
    level_0 = {name: round(size * (1 - sparsity)) for name, size in sizes.items()}
    step, limits = level_grid(sizes, level_0, levels)
    for name, (low, high) in limits.items():
        assert 0 <= level_0[name] + low * step <= level_0[name] + high * step <= sizes[name]
        assert -levels <= low <= 0 <= high <= levels


def test_a_policy_that_overflows_never_wins():
    def overflowing(policies: Sequence[Policy], samples: Sequence[int]) -> list[float]:
        return [float("nan") if p[0] > 0 else d for p, d in zip(policies, distance(policies, samples), strict=True)]

    evolution = Evolution(LIMITS, 16, QUICK, 0, overflowing, no_risk)
    state = go(evolution, evolution.start(), 30)
    assert state.parent[0] <= 0 and state.parent != (0,) * 6
