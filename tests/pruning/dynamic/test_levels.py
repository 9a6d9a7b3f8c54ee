"""The menu, and that the routes made from it are what was promised and reserved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.vision.features import ImageFeatures
from pruning.dynamic.levels import Level, build_menu, expected_rows, layers_to_run, make_route
from pruning.dynamic.token_merging import TOKEN_POLICIES

changes = st.lists(st.floats(0, 2), min_size=1, max_size=48)


def features(images: int, side: int = 6, width: int = 4) -> list[ImageFeatures]:
    generator = torch.Generator().manual_seed(images)
    total = side * side
    return [
        ImageFeatures(torch.randn(1, total, width, generator=generator), torch.rand(1, total, generator=generator))
        for _ in range(images)
    ]


@given(change=st.none() | changes, layers=st.integers(1, 48))
def test_levels_only_ever_reduce_work_and_off_reduces_none(change, layers):
    menu = build_menu(change, layers)
    assert list(menu) == ["off", "light", "balanced", "strong"]
    assert all(level.name == name for name, level in menu.items())
    ratios = [level.visual_ratio for level in menu.values()]
    assert ratios == sorted(ratios, reverse=True)
    assert (menu["off"].visual_ratio, menu["off"].skipped_layers) == (1.0, 0)
    for level in menu.values():
        assert 0 < level.visual_ratio <= 1
        assert 0 <= level.skipped_layers <= max(0, layers - 2)
        for tokens in (1, 16, 144, 576, 577):
            assert 1 <= level.kept(tokens) <= tokens


def test_a_picture_never_vanishes_and_none_appears():
    level = Level("sliver", "", visual_ratio=1e-6)
    assert level.kept(576) == 1
    assert level.kept(0) == 0


def test_without_a_calibration_no_level_skips_a_layer():
    assert not any(level.skipped_layers for level in build_menu(None, 64).values())
    assert build_menu([0.1] * 64, 64)["strong"].skipped_layers == 4
    assert "60 of 64 layers" in build_menu([0.1] * 64, 64)["strong"].description
    with pytest.raises(ValueError, match="espalier calibrate"):
        layers_to_run(64, 4, None)


def test_a_calibration_of_another_model_is_refused():
    with pytest.raises(ValueError, match="all 32 layers"):
        layers_to_run(32, 2, [0.1] * 31)


def test_cards_stand_on_the_menu():
    menu = build_menu(None, 8, {"strong": {"accuracy": 0.9}})
    assert menu["strong"].card == {"accuracy": 0.9}
    assert menu["off"].card is None


@given(change=changes, data=st.data())
def test_the_layers_that_change_least_are_skipped_never_the_first_or_the_last(change, data):
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


@given(
    images=st.integers(0, 3), ratio=st.floats(0.001, 1), layers=st.integers(3, 10), text=st.integers(1, 50),
    policy=st.sampled_from([policy for policy in TOKEN_POLICIES if policy != "router"]), data=st.data(),
)  # fmt: skip
def test_a_route_holds_the_rows_that_were_reserved_for_it(images, ratio, layers, text, policy, data):
    """Memory is reserved before the route is made; a route may need less (pooling), never more."""
    skipped = data.draw(st.integers(0, layers - 2))
    level = Level("some", "", ratio, skipped)
    pictures = features(images)
    change = [float(layer % 5) for layer in range(layers)]
    route, visual = make_route(level, pictures, layers, change, policy, seed=5)
    prompt = text + images * 36
    reserved = expected_rows(level, prompt, images, 36, layers)
    if policy == "pooling":
        assert sum(route.rows(prompt)) <= reserved
    else:
        assert sum(route.rows(prompt)) == reserved
    assert route.layers == layers_to_run(layers, skipped, change)
    assert route.visual_tokens == images * 36
    if not images:
        assert visual is None
    else:
        assert visual.shape == (images * 36, 4)
        shares = [sum(36 * i <= index < 36 * (i + 1) for index in route.kept_tokens) for i in range(images)]
        assert len(set(shares)) == 1, "each picture keeps as much as the others"


def test_off_is_the_whole_model():
    pictures = features(2)
    route, visual = make_route(build_menu([0.0] * 4, 4)["off"], pictures, 4, [0.0] * 4, "merging", seed=0)
    assert route.dropped == 0
    assert all(route.layers)
    assert torch.equal(visual, torch.cat([picture.tokens[0] for picture in pictures]))
