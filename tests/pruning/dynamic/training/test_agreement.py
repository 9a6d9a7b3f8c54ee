"""What the agreement head learns, and the cost weights that follow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from pruning.dynamic.levels import AUTO, OperatingPoint
from pruning.dynamic.training.agreement import BUDGETS, HeldOut, fewest_above, find_levels, fit, fit_and_validate, keeping, sweep

POINTS = [OperatingPoint(share, 0, 0, share) for share in (0.1, 0.3, 0.6, 1.0)]


def test_the_head_finds_what_separates_and_says_how_sure_it_is():
    generator = torch.Generator().manual_seed(0)
    features = 5 + 3 * torch.randn(3000, 4, generator=generator)
    true = torch.stack([(features[:, 1] - 5).sigmoid(), ((features[:, 2] - 5) * (features[:, 3] - 5) / 3).sigmoid()], 1)
    happened = (torch.rand(3000, 2, generator=generator) < true).float()
    before = torch.random.get_rng_state()
    head = fit(features[:2000], happened[:2000], 64)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (head(features[2000:]).sigmoid() - true[2000:]).abs().mean() < 0.1
    assert torch.equal(fit(features[:2000], happened[:2000], 64)(features), head(features))


def test_no_picture_tells_of_itself():
    """Each picture's margins can be learned by heart from its features; held out, they are as good as chance."""
    picture = torch.arange(60).repeat_interleave(5)
    features = F.one_hot(picture, 60).float()
    margins = torch.randn(60, 1, generator=torch.Generator().manual_seed(1)).sign()[picture] * 5
    head, expected = fit_and_validate(features, margins, picture, 64)
    known, unseen = ((agreement > 0.5) == (margins > 0) for agreement in (head(features).sigmoid(), expected))
    assert known.float().mean() > 0.9
    assert unseen.float().mean() < 0.7


@pytest.fixture(name="held_out", scope="module")
def held_out_answers() -> HeldOut:
    """Answers that stay as often as is expected."""
    generator = torch.Generator().manual_seed(0)
    expected = torch.rand(500, 3, generator=generator).sort(1).values
    stayed = torch.rand(500, 3, generator=generator) < expected
    return HeldOut(F.pad(expected, (0, 1), value=1.0), F.pad(stayed, (0, 1), value=True), POINTS)


def test_levels_spend_their_budgets_and_no_less_than_they_must(held_out):
    levels = find_levels(held_out, torch.arange(500) < 100, 0.9)
    assert list(levels) == [*BUDGETS, AUTO]
    for name, budget in BUDGETS.items():
        assert budget - 0.02 < levels[name].first.flops_ratio <= budget
        assert levels[name].first.cost_weight == levels[name].follow_up.cost_weight
        assert (levels[name].first.questions, levels[name].follow_up.questions) == (400, 100)


def test_a_sweep_goes_from_all_to_little_with_and_without_layers(held_out):
    frozen = replace(held_out, points=[*(replace(point, frozen_layers=2) for point in POINTS[:2]), *POINTS[2:]])
    swept = sweep(frozen)
    spent = [one.flops_ratio for one in swept["tokens and layers"]]
    assert spent == sorted(spent, reverse=True)
    assert spent[0] > 0.9
    assert spent[-1] == pytest.approx(0.1)
    assert min(one.visual_ratio for one in swept["tokens"]) == pytest.approx(0.6)


def test_where_no_point_keeps_anything_auto_runs_the_whole_model():
    expected, stayed = torch.zeros(10, 4), torch.zeros(10, 4, dtype=torch.bool)
    expected[:, 3], stayed[:, 3] = 1.0, True
    auto = find_levels(HeldOut(expected, stayed, POINTS), torch.arange(10) < 5, 0.99)[AUTO]
    for found in (auto.first, auto.follow_up):
        assert (found.agreement, found.visual_ratio) == (1.0, 1.0)


@pytest.mark.parametrize("target", [0.8, 0.9, 0.99])
def test_auto_keeps_the_share_that_is_asked_for_of_both_kinds(held_out, target):
    """Follow-ups are harder: at the others' cost weight they would be answered worse. To be sure it takes a few more."""
    less = torch.tensor([0.7, 0.7, 0.7, 1.0])
    stays = held_out.stayed & (torch.rand(500, 4, generator=torch.Generator().manual_seed(1)) < less)
    both = HeldOut(torch.cat([held_out.expected, held_out.expected * less]), torch.cat([held_out.stayed, stays]), POINTS)
    auto = find_levels(both, torch.arange(1000) >= 500, target)[AUTO]
    for found in (auto.first, auto.follow_up):
        stayed = round(500 * found.agreement)
        assert binomtest(stayed, 500, target, "greater").pvalue < 0.06
        assert stayed < 500 * target + 30, "and not many more"
    assert auto.first.flops_ratio < auto.follow_up.flops_ratio <= POINTS[-1].cost


@pytest.mark.parametrize(("share", "n"), [(0.99, 4000), (0.99, 299), (0.9, 30), (0.5, 7)])
def test_a_share_is_above_another_by_more_than_chance(share, n):
    fewest = fewest_above(share, n)
    chance = [binomtest(count, n, share, "greater").pvalue for count in (fewest, fewest - 1)]
    assert chance[0] <= 0.05 < chance[1]


@pytest.mark.parametrize(("n", "proven"), [(2, False), (298, False), (299, True)])
def test_few_answers_prove_no_high_share(n, proven):
    """Though all of them stay."""
    expected = torch.tensor([0.5, 0.6, 0.7, 1.0]).repeat(n, 1)
    found = keeping(HeldOut(expected, torch.ones(n, 4, dtype=torch.bool), POINTS), 0.99)
    assert (found.flops_ratio < POINTS[-1].cost) == proven


def test_where_no_question_follows_another_none_is_told_of(held_out):
    levels = find_levels(held_out, torch.zeros(500, dtype=torch.bool), 0.9)
    assert levels[AUTO].first == keeping(held_out, 0.9)
    assert [level.follow_up for level in levels.values()] == [None] * 4
