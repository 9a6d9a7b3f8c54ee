"""The criteria against brute force, OBS and ALPS against their optimality conditions."""

from __future__ import annotations

from itertools import combinations
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pruning.static import alps, magnitude, masks, obs, wanda

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 24))


def rows_of(columns: int, seed: int, count: int = 64) -> Tensor:
    """Correlated activations, float32 [count, columns]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)


def hessian_of(rows: Tensor, parts: int = 1) -> obs.Hessian:
    statistics = obs.empty(rows.shape[1])
    for part in rows.chunk(parts):
        obs.accumulate(statistics, part)
    return statistics


def loss(before: Tensor, after: Tensor, rows: Tensor) -> float:
    return float((rows @ (before - after).T).double().square().sum())


# ---- masks


@given(SHAPES, st.floats(0, 1), st.integers(0, 99))
def test_totals_are_exact(shape, sparsity, seed):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    nonzeros = round(scores.numel() * (1 - sparsity))
    for mask in (masks.lowest_per_row(scores, nonzeros), masks.lowest_per_matrix(scores, nonzeros)):
        assert int((~mask).sum()) == nonzeros
    by_row = masks.lowest_per_row(scores, nonzeros).sum(1)
    assert by_row.max() - by_row.min() <= 1


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_two_of_every_four_are_zero_and_they_are_the_lowest(rows, groups, seed):
    scores = torch.rand(rows, groups * 4, generator=torch.Generator().manual_seed(seed))
    mask = masks.lowest_per_group(scores).view(rows, groups, 4)
    assert (mask.sum(2) == 2).all()
    grouped = scores.view_as(mask)
    assert (grouped.masked_fill(~mask, -1).amax(2) <= grouped.masked_fill(mask, 2).amin(2)).all()


def test_rows_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ValueError, match="do not divide into groups of 4"):
        masks.lowest_per_group(torch.ones(2, 6))


# ---- magnitude and Wanda


def test_magnitude_drops_the_smallest_and_changes_nothing_else():
    weight = torch.tensor([[3.0, -1.0, 2.0], [0.5, -4.0, 1.5]])
    assert magnitude.prune(weight, None, 3, "unstructured").tolist() == [[3.0, 0, 2.0], [0, -4.0, 0]]


def test_wanda_weighs_by_the_norm_of_the_input_within_each_row():
    rows = torch.tensor([[10.0, 1.0, 0.1, 1.0]] * 3)
    statistics = wanda.empty(4)
    wanda.accumulate(statistics, rows)
    weight = torch.tensor([[0.2, 1.0, 5.0, 0.3], [1.0, 1.0, 1.0, 0.9]])
    pruned = wanda.prune(weight, wanda.prepare(statistics), 4, "unstructured")
    assert pruned.tolist() == [[pytest.approx(0.2), 1.0, 0, 0], [1.0, 1.0, 0, 0]]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_statistics_are_the_same_in_one_batch_or_many(parts):
    rows = rows_of(6, 3, count=40)
    expected = 2 * rows.T @ rows / len(rows)
    assert torch.allclose(hessian_of(rows, parts).matrix, expected, rtol=1e-4)
    norms = wanda.empty(6)
    for part in rows.chunk(parts):
        wanda.accumulate(norms, part)
    assert torch.allclose(wanda.prepare(norms), expected.diagonal().div(2).sqrt(), rtol=1e-4)


# ---- OBS


def brute_force(weight: Tensor, hessian: Tensor, drop: int) -> tuple[float, Tensor]:
    """The best row with weight `drop` zero and everything to its left as it was: least squares in float64."""
    after = weight.double().clone()
    after[drop] = 0
    right = slice(drop + 1, None)
    wrong = hessian.double()[right, drop] * weight[drop].double()
    if len(wrong):
        after[right] += torch.linalg.solve(hessian.double()[right, right], wrong)
    change = after - weight.double()
    return float(change @ hessian.double() @ change), after


@pytest.mark.parametrize("seed", range(8))
def test_one_weight_goes_as_brute_force_says(seed):
    rows = rows_of(7, seed)
    weight = torch.randn(1, 7, generator=torch.Generator().manual_seed(seed))
    factor = obs.prepare(hessian_of(rows), damping=1e-6)
    pruned = obs.prune(weight, factor, 6, "unstructured")
    hessian = hessian_of(rows).matrix
    hessian = hessian + 1e-6 * hessian.diagonal().mean() * torch.eye(7)
    costs = [brute_force(weight[0], hessian, drop) for drop in range(7)]
    _, expected = min(costs, key=lambda cost: cost[0])
    assert torch.allclose(pruned[0].double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_what_the_last_columns_keep_is_stationary(seed):
    """OBS's condition: no change of the kept weights to the right of the last dropped one lowers the loss."""
    rows = rows_of(12, seed)
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed))
    pruned = obs.prune(weight, obs.prepare(hessian_of(rows), damping=1e-7), 24, "unstructured")
    gradient = (pruned - weight).double() @ (rows.T @ rows).double()
    for row in range(4):
        last = int((pruned[row] == 0).nonzero().max())
        assert (gradient[row, last + 1 :].abs() < 1e-3 * gradient.abs().max() + 1e-3).all()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("block_size", [4, 16, 128])
def test_obs_loses_less_than_its_mask_alone_and_than_magnitude(pattern, block_size):
    rows = rows_of(32, 5, count=256)
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))
    pruned = obs.prune(weight, obs.prepare(hessian_of(rows)), weight.numel() // 2, pattern, block_size=block_size)
    assert int((pruned != 0).sum()) == weight.numel() // 2
    assert loss(weight, pruned, rows) < 0.8 * loss(weight, weight.masked_fill(pruned == 0, 0), rows)
    assert loss(weight, pruned, rows) < loss(weight, magnitude.prune(weight, None, weight.numel() // 2, pattern), rows)


def test_uncorrelated_inputs_of_one_size_make_it_magnitude():
    weight = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    statistics = obs.Hessian(torch.eye(16), 1)
    pruned = obs.prune(weight, obs.prepare(statistics), 64, "unstructured")
    assert torch.allclose(pruned, magnitude.prune(weight, None, 64, "unstructured"))


@given(st.integers(1, 6), st.integers(1, 40), st.floats(0, 1), st.integers(1, 50), st.integers(0, 9))
def test_obs_totals_are_exact_in_blocks_of_any_size(out, columns, sparsity, block_size, seed):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    kept = round(weight.numel() * (1 - sparsity))
    pruned = obs.prune(weight, obs.prepare(hessian_of(rows_of(columns, seed))), kept, "unstructured", block_size=block_size)
    assert int((pruned != 0).sum()) == kept


def test_bfloat16_weights_are_pruned_in_float32():
    rows, weight = rows_of(16, 2), torch.randn(8, 16).bfloat16()
    pruned = obs.prune(weight, obs.prepare(hessian_of(rows)), 64, "unstructured")
    assert pruned.dtype == torch.bfloat16
    assert torch.equal(pruned, obs.prune(weight.float(), obs.prepare(hessian_of(rows)), 64, "unstructured").bfloat16())


# ---- ALPS


@given(st.integers(1, 6), st.integers(1, 40), st.floats(0, 1), st.integers(0, 9))
def test_alps_totals_are_exact(out, columns, sparsity, seed):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    kept = round(weight.numel() * (1 - sparsity))
    assert int((alps.prune(weight, alps.prepare(hessian_of(rows_of(columns, seed))), kept, "unstructured") != 0).sum()) == kept


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_alps_loses_less_than_half_of_what_obs_does(pattern):
    rows = rows_of(32, 5, count=256)
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))
    kept = weight.numel() // 2
    ours = alps.prune(weight, alps.prepare(hessian_of(rows)), kept, pattern)
    assert int((ours != 0).sum()) == kept
    if pattern == "2:4":
        assert ((ours != 0).view(24, 8, 4).sum(2) == 2).all()
    assert loss(weight, ours, rows) < 0.5 * loss(weight, obs.prune(weight, obs.prepare(hessian_of(rows)), kept, pattern), rows)


def test_alps_is_near_the_best_of_all_masks():
    """Of eight weights four stay; what is lost beside the least that any of the 70 masks loses."""
    beside_the_best = {alps: [], obs: []}
    for seed in range(40):
        rows, weight = rows_of(8, seed), torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
        least = min(loss(weight, solved(weight, list(kept), rows), rows) for kept in combinations(range(8), 4))
        for criterion, found in beside_the_best.items():
            pruned = criterion.prune(weight, criterion.prepare(hessian_of(rows)), 4, "unstructured")
            found.append(loss(weight, pruned, rows) / least)
    assert median(beside_the_best[alps]) < 1.6
    assert median(beside_the_best[obs]) > 3


def test_alps_solves_for_the_weights_of_its_mask():
    rows = rows_of(12, 3, count=256)
    weight = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    pruned = alps.prune(weight, alps.prepare(hessian_of(rows)), 6, "unstructured")
    best = solved(weight, pruned[0].nonzero()[:, 0].tolist(), rows)
    assert loss(weight, pruned, rows) < 1.02 * loss(weight, best, rows)


def solved(weight: Tensor, kept: list[int], rows: Tensor) -> Tensor:
    """A weight [1, in] of which some are kept, and changed to make up for the others: least squares in float64."""
    found = torch.zeros_like(weight, dtype=torch.float64)
    found[0, kept] = torch.linalg.lstsq(rows.double()[:, kept], rows.double() @ weight[0].double()).solution
    return found.float()


# ---- what goes wrong


@pytest.mark.parametrize("criterion", [obs, alps])
def test_a_dead_input_is_dropped_first_and_does_no_harm(criterion):
    rows = rows_of(8, 4)
    rows[:, 3] = 0
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    pruned = criterion.prune(weight, criterion.prepare(hessian_of(rows)), 28, "unstructured")
    assert int((pruned != 0).sum()) == 28
    assert (pruned[:, 3] == 0).all() and torch.allclose(pruned[:, :3], weight[:, :3], atol=1e-5)
    assert loss(weight, pruned, rows) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("criterion", [obs, alps])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_totals_hold_with_more_dead_inputs_than_weights_to_drop(criterion, pattern):
    rows = rows_of(8, 4)
    rows[:, [0, 1, 2, 5, 6, 7]] = 0
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    assert int((criterion.prune(weight, criterion.prepare(hessian_of(rows)), 16, pattern) != 0).sum()) == 16


def test_a_hessian_that_is_not_finite_is_refused():
    statistics = hessian_of(rows_of(4, 0))
    statistics.matrix[1, 2] = float("inf")
    with pytest.raises(obs.HessianError, match="not finite; calibrate in float32"):
        obs.prepare(statistics)
    with pytest.raises(obs.HessianError, match="not finite; calibrate in float32"):
        alps.prepare(statistics)
    norms = wanda.empty(4)
    wanda.accumulate(norms, torch.full((1, 4), float("nan")))
    with pytest.raises(ValueError, match="not finite; calibrate in float32"):
        wanda.prepare(norms)


def test_a_singular_hessian_is_damped_more_and_that_is_told():
    rows = rows_of(64, 0, count=2)  # of rank two
    factor = obs.prepare(hessian_of(rows), damping=1e-9)
    assert factor.retries > 0 and factor.damping > 1e-9
    assert factor.upper.isfinite().all()


def test_a_hessian_that_stays_singular_is_refused():
    matrix = -torch.eye(4) * 5
    with pytest.raises(obs.HessianError, match=r"stays singular .* more calibration samples"):
        obs.prepare(obs.Hessian(matrix, 1))


def test_a_matrix_that_no_row_reached_is_refused():
    with pytest.raises(obs.HessianError, match="no calibration row reached"):
        obs.prepare(obs.empty(4))
