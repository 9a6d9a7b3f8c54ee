"""The menu without a router, how a level chooses an operating point, and which layers that leaves out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pruning.dynamic.levels import (
    Level,
    OperatingPoint,
    choose,
    fixed_menu,
    layers_to_freeze,
    layers_to_run,
    read_patch_ratio,
)

changes = st.lists(st.floats(0, 2), min_size=1, max_size=48)
share = st.floats(0, 1, width=32)


@given(change=st.none() | changes, layers=st.integers(1, 48))
def test_levels_only_reduce_work_and_off_reduces_none(change, layers):
    menu = fixed_menu(change, layers)
    assert list(menu) == ["off", "light", "balanced", "strong"]
    assert all(level.name == name and not level.routed for name, level in menu.items())
    ratios = [level.visual_ratio for level in menu.values()]
    assert ratios == sorted(ratios, reverse=True)
    for level in menu.values():
        (point,) = level.operating_points
        assert point.visual_ratio == level.visual_ratio
        assert 0 < point.visual_ratio <= 1
        assert 0 <= point.skipped_layers <= max(0, layers - 2)
        for tokens in (1, 16, 144, 576, 577):
            assert 1 <= point.kept(tokens) <= tokens
    assert menu["off"].operating_points == (OperatingPoint(),)


def test_a_picture_never_vanishes_and_none_appears():
    point = OperatingPoint(visual_ratio=1e-6)
    assert point.kept(576) == 1
    assert point.kept(0) == 0


def test_without_a_calibration_no_level_skips_a_layer():
    skipped = [level.operating_points[0].skipped_layers for level in fixed_menu(None, 64).values()]
    assert not any(skipped)
    strong = fixed_menu([0.1] * 64, 64)["strong"]
    assert strong.operating_points[0].skipped_layers == 4
    assert "60 of 64 layers" in strong.description


def test_cards_stand_on_the_menu():
    menu = fixed_menu(None, 8, {"strong": {"accuracy": 0.9}})
    assert menu["strong"].card == {"accuracy": 0.9}
    assert menu["off"].card is None


@pytest.mark.parametrize(
    ("given", "told"),
    [("off=0.5", "are light, balanced, strong"), ("auto=0.5", "are light, balanced, strong"), ("strong=0", "at most 1, not 0"),
     ("strong=1.5", "at most 1, not 1.5"), ("strong=nan", "not nan"), ("strong", "LEVEL=SHARE"), ("strong=half", "LEVEL=SHARE")],
)  # fmt: skip
def test_a_share_of_patches_that_is_none_is_refused(given, told):
    assert read_patch_ratio(["light=1", "strong=0.5"]) == {"light": 1, "strong": 0.5}
    with pytest.raises(ValueError, match=told):
        read_patch_ratio([given])


@given(data=st.data(), points=st.integers(2, 6))
def test_a_cost_weight_buys_what_no_fixed_point_does(data, points):
    """At what the weights spend on average, no single point for all requests is expected to keep more answers."""
    row = st.lists(share, min_size=points, max_size=points)
    expected = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=8)))
    costs = torch.tensor(sorted(data.draw(row)))
    low, high = sorted(data.draw(st.lists(st.floats(0.01, 10), min_size=2, max_size=2)))
    few, many = (choose(expected, costs, weight) for weight in (high, low))
    assert costs[few].mean() <= costs[many].mean() + 1e-6, "a higher weight never spends more"
    kept, spent = expected.gather(1, few[:, None]).mean(), costs[few].mean()
    for point in range(points):
        if costs[point] <= spent:
            assert expected[:, point].mean() <= kept + 1e-5


@pytest.mark.parametrize(("follow_up", "chosen"), [(False, 0.5), (True, 1.0)])
def test_a_follow_up_question_has_a_cost_weight_of_its_own(follow_up, chosen):
    points = (OperatingPoint(0.5, cost=0.5), OperatingPoint())
    level = Level("some", "", 0.7, points, cost_weight=1.0, follow_up_cost_weight=0.1)
    point, expected = level.choose([0.9, 1.0], follow_up=follow_up)
    assert (point.visual_ratio, expected) == (chosen, 0.9 if chosen == 0.5 else 1.0)


# ---- which layers a point leaves out


@given(change=st.lists(st.floats(0, 2), min_size=1, max_size=48), data=st.data())
def test_the_layers_that_change_least_are_skipped(change, data):
    """Never the first or the last."""
    layers = len(change)
    skipped = data.draw(st.integers(0, max(0, layers - 2)))
    runs = layers_to_run(layers, skipped, change)
    assert len(runs) == layers
    assert runs.count(False) == skipped
    assert runs[0]
    assert runs[-1]
    inner = range(1, layers - 1)
    idle = [change[layer] for layer in inner if not runs[layer]]
    busy = [change[layer] for layer in inner if runs[layer]]
    assert not idle or not busy or max(idle) <= min(busy)


def test_skipping_needs_a_calibration_of_this_model():
    with pytest.raises(ValueError, match="espalier calibrate"):
        layers_to_run(64, 4, None)
    with pytest.raises(ValueError, match="all 32 layers"):
        layers_to_run(32, 2, [0.1] * 31)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 12), st.data())
def test_the_cheapest_layers_that_run_are_frozen(runs, frozen, data):
    """Never the first, the last or one that is skipped."""
    scores = data.draw(st.lists(st.floats(-9, 9), min_size=len(runs), max_size=len(runs)))
    chosen = layers_to_freeze(runs, frozen, scores)
    inner = [layer for layer in range(1, len(runs) - 1) if runs[layer]]
    assert chosen <= set(inner)
    assert len(chosen) == min(frozen, len(inner))
    assert all(scores[a] <= scores[b] for a in chosen for b in inner if b not in chosen)
