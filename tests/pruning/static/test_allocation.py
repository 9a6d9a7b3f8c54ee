"""Allocators: exact totals whatever the scores, and each one's own rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.static import allocation
from pruning.static.allocation import block_of

SIZES = st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=6).map(
    lambda pairs: {f"language.{i}.{name}": size for i, pair in enumerate(pairs) for name, size in zip("qo", pair, strict=True)}
)


def scores_for(sizes: dict[str, int], values: list[float]) -> dict[str, float]:
    return {name: values[i % len(values)] for i, name in enumerate(sizes)}


POSITIVE = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12)


@given(SIZES, st.floats(0, 0.99), POSITIVE)
def test_totals_are_exact_and_within_the_sizes(sizes, sparsity, values):
    scores = scores_for(sizes, values)
    for nonzeros in (
        allocation.uniform(sizes, sparsity),
        allocation.ecoflap(sizes, scores, sparsity),
        allocation.owl(sizes, scores, sparsity),
    ):
        assert sum(nonzeros.values()) == allocation.total(sizes, sparsity)
        assert all(0 <= nonzeros[name] <= size for name, size in sizes.items())


@given(SIZES, st.floats(0.1, 0.9), POSITIVE)
def test_no_block_loses_more_than_the_maximum(sizes, sparsity, values):
    maximum = min(sparsity + allocation.MARGIN, 1.0)
    nonzeros = allocation.ecoflap(sizes, scores_for(sizes, values), sparsity)
    for block in {block_of(name) for name in sizes}:
        names = [name for name in sizes if block_of(name) == block]
        lost = sum(sizes[name] - nonzeros[name] for name in names)
        assert lost <= maximum * sum(sizes[name] for name in names) + len(sizes)  # rounding


def test_a_block_of_a_higher_score_keeps_more_until_it_is_full():
    sizes = {"language.0.q": 10, "language.1.q": 100, "language.2.q": 100}
    nonzeros = allocation.ecoflap(sizes, {"language.0.q": 100.0, "language.1.q": 2.0, "language.2.q": 1.0}, 0.5)
    assert nonzeros["language.0.q"] == 10
    # 105 to keep, 40 % of each block as of right; the first takes 6 more, and the 15 left are dealt two to one
    assert (nonzeros["language.1.q"], nonzeros["language.2.q"]) == (50, 45)


def test_all_matrices_of_a_block_lose_the_same_share():
    sizes = {"language.0.q": 100, "language.0.up": 400, "language.1.q": 100, "language.1.up": 400}
    scores = {"language.0.q": 1.0, "language.0.up": 5.0, "language.1.q": 2.0, "language.1.up": 1.0}
    nonzeros = allocation.ecoflap(sizes, scores, 0.5)
    for block in ("language.0", "language.1"):
        assert nonzeros[f"{block}.q"] / 100 == pytest.approx(nonzeros[f"{block}.up"] / 400, abs=0.01)
    assert nonzeros["language.0.q"] > nonzeros["language.1.q"]


def test_owl_keeps_more_where_there_are_more_outliers():
    sizes = {f"language.{i}.q": 1000 for i in range(4)}
    nonzeros = allocation.owl(sizes, {name: float(i) for i, name in enumerate(sizes)}, 0.5)
    shares = [nonzeros[name] / 1000 for name in sizes]
    assert shares == sorted(shares)
    assert shares[-1] - shares[0] == pytest.approx(2 * allocation.OWL_RANGE, abs=0.002)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scores_that_are_not_finite_and_positive_are_refused(bad):
    with pytest.raises(ValueError, match="not finite and positive"):
        allocation.ecoflap({"language.0.q": 4, "language.1.q": 4}, {"language.0.q": bad, "language.1.q": 1.0}, 0.5)


def test_what_is_too_much_is_taken_from_all_alike():
    sizes = {f"language.{i}.q": 100 for i in range(4)}
    nonzeros = allocation.apportion(sizes, dict.fromkeys(sizes, 60.0), 200)
    assert set(nonzeros.values()) == {50}
