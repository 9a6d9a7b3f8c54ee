"""The planner: no plan holds more than was reserved, and a router that fails leaves level off."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.checkpoint import load
from models.errors import CheckpointError
from models.families import Layout
from models.flops import flops_ratio
from models.vision.features import ImageFeatures
from pruning.dynamic.levels import AUTO, Level, OperatingPoint, layers_to_run
from pruning.dynamic.planner import Planner, load_menu, make_route
from pruning.dynamic.router import score_request, text_window
from pruning.dynamic.router_file import RouterRecord
from tests.pruning.dynamic.tiny_router import POINTS, RISING, expect, plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.server.tiny import LAYERS, VISUAL

WIDTH = 48
LEVELS = ("off", "light", "balanced", "strong", AUTO, "some")


def pictures(count: int, side: int = 12) -> list[ImageFeatures]:
    generator = torch.Generator().manual_seed(count)
    total = side * side
    return [
        ImageFeatures(torch.randn(1, total, WIDTH, generator=generator), torch.rand(1, total, generator=generator))
        for _ in range(count)
    ]


def prompt_of(planner: Planner, images: int, text: int) -> list[int]:
    return [*[planner.model.config.image_token_id] * (VISUAL * images), *range(40, 40 + text)]


@pytest.fixture(name="planner", scope="module")
def routed_planner(routed) -> Planner:
    return Planner(load(routed))


@pytest.fixture(name="merging", scope="module")
def merging_planner(plain) -> Planner:
    return Planner(load(plain))


# ---- what is reserved and what is planned


@given(data=st.data(), images=st.integers(0, 3), text=st.integers(1, 50), answer=st.integers(1, 20), follow_up=st.booleans())
def test_no_plan_of_a_router_holds_more_than_was_reserved(planner, data, images, text, answer, follow_up):
    agreement = data.draw(st.lists(st.floats(0.001, 0.999), min_size=POINTS, max_size=POINTS))
    expect(planner.router, agreement)
    level = data.draw(st.sampled_from([name for name in LEVELS if name in planner.menu]))
    planner.menu[level] = replace(planner.menu[level], cost_weight=data.draw(st.floats(0, 100)))
    prompt = prompt_of(planner, images, text)
    reserved = planner.reserve(level, len(prompt), [Layout(VISUAL)] * images, answer)
    plan = planner.plan(level, "body", prompt, pictures(images), follow_up=follow_up)
    rows = plan.route.rows(len(prompt))
    assert sum(n + answer for n in rows if n) <= reserved.cache_rows
    assert max(rows) <= reserved.prefill_tokens
    assert (plan.level, plan.reason) == (level, "body")
    assert (plan.visual is None) == (images == 0)


@given(
    images=st.integers(0, 3), ratio=st.floats(0.001, 1), skipped=st.integers(0, LAYERS - 2), text=st.integers(1, 50),
    answer=st.integers(1, 20),
)  # fmt: skip
def test_without_a_router_a_plan_holds_what_was_reserved(merging, images, ratio, skipped, text, answer):
    merging.menu["some"] = Level("some", "", ratio, (OperatingPoint(ratio, skipped),))
    prompt = prompt_of(merging, images, text)
    reserved = merging.reserve("some", len(prompt), [Layout(VISUAL)] * images, answer)
    plan = merging.plan("some", "body", prompt, pictures(images))
    rows = plan.route.rows(len(prompt))
    assert sum(n + answer for n in rows if n) == reserved.cache_rows
    assert max(rows) == reserved.prefill_tokens
    assert plan.route.layers == layers_to_run(LAYERS, skipped, merging.layer_change)
    assert plan.expected_agreement is None
    if images:
        assert plan.visual.shape == (images * VISUAL, WIDTH)
        kept = plan.route.kept_tokens
        shares = [sum(VISUAL * i <= index < VISUAL * (i + 1) for index in kept) for i in range(images)]
        assert len(set(shares)) == 1, "each picture keeps as much as the others"


@given(data=st.data(), images=st.integers(1, 3), ratio=st.floats(0.001, 1), skipped=st.integers(0, LAYERS - 2))
def test_a_plan_of_tiled_pictures_holds_no_more_than_reserved(merging, data, images, ratio, skipped):
    sizes = st.integers(0, 6)
    layouts = [
        Layout(9, newline=True, grid=(1, 1), rows=data.draw(sizes), columns=data.draw(sizes)) if data.draw(st.booleans())
        else Layout(9, newline=True)
        for _ in range(images)
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(images)
    features = [ImageFeatures(torch.randn(1, one.visual_tokens, WIDTH, generator=generator), None, one) for one in layouts]
    merging.menu["some"] = Level("some", "", ratio, (OperatingPoint(ratio, skipped),))
    total = sum(one.visual_tokens for one in layouts)
    prompt = [*[merging.model.config.image_token_id] * total, *range(40, 50)]
    reserved = merging.reserve("some", len(prompt), layouts, 7)
    plan = merging.plan("some", "body", prompt, features)
    rows = plan.route.rows(len(prompt))
    assert sum(n + 7 for n in rows if n) <= reserved.cache_rows
    assert max(rows) <= reserved.prefill_tokens <= len(prompt)
    assert plan.route.visual_tokens == len(plan.visual) == total
    start = 0
    for one in layouts:
        kept = {token - start for token in plan.route.kept_tokens if start <= token < start + one.visual_tokens}
        others = sorted(kept - set(one.newlines))
        wanted = one.newlines if len(others) + len(one.newlines) == one.visual_tokens else one.newlines_of(others)
        assert kept - set(others) == set(wanted)
        start += one.visual_tokens


def test_what_off_needs_is_the_most_that_is_ever_reserved(planner):
    two = [Layout(VISUAL)] * 2
    off = planner.reserve("off", 300, two, 8)
    assert (off.cache_rows, off.prefill_tokens) == (308 * LAYERS, 300)
    assert planner.reserve("balanced", 300, two, 8) == planner.reserve(AUTO, 300, two, 8) == off


def test_off_is_the_whole_model(planner):
    images = pictures(2)
    plan = planner.plan("off", "default", prompt_of(planner, 2, 5), images)
    assert plan.route.dropped == 0
    assert all(plan.route.layers)
    assert torch.equal(plan.visual, torch.cat([picture.tokens[0] for picture in images]))
    assert plan.flops_ratio == 1


@pytest.mark.parametrize("level", ["balanced", AUTO])
def test_without_a_picture_there_is_nothing_to_route(planner, level):
    plan = planner.plan(level, "body", [40, 41], [])
    assert (plan.level, plan.route.visual_tokens, plan.flops_ratio, plan.expected_agreement) == (level, 0, 1.0, None)


# ---- what a router makes of it


def test_levels_are_the_cost_weights_that_were_found(plain, routed):
    checkpoint = load(routed)
    record, menu = RouterRecord.of(checkpoint.manifest), load_menu(checkpoint)
    assert list(menu) == ["off", "light", "balanced", "strong", AUTO]
    for name, found in record.levels.items():
        assert (menu[name].cost_weight, menu[name].visual_ratio) == (found.first.cost_weight, found.first.visual_ratio)
        assert menu[name].follow_up_cost_weight == found.follow_up.cost_weight
        assert f"{found.first.flops_ratio:.0%} of the FLOPs" in menu[name].description
        assert menu[name].operating_points == record.operating_points
    assert [asdict(point) for point in record.operating_points] == checkpoint.manifest.router["operating_points"]
    assert AUTO not in load_menu(load(plain))
    assert AUTO not in load_menu(checkpoint, routed=False), "nobody is there to choose"


def test_auto_runs_follow_ups_whole_where_none_was_measured(routed):
    checkpoint = load(routed)
    levels = {name: {"first": level["first"]} for name, level in checkpoint.manifest.router["levels"].items()}
    router = checkpoint.manifest.router | {"levels": levels}
    checkpoint.manifest = checkpoint.manifest.model_copy(update={"router": router})
    menu = load_menu(checkpoint)
    assert menu[AUTO].follow_up_cost_weight == 0
    assert menu["strong"].follow_up_cost_weight == menu["strong"].cost_weight > 0


def test_a_level_says_what_its_tower_sees(routed):
    checkpoint = load(routed)
    checkpoint.manifest = checkpoint.manifest.model_copy(update={"patch_ratio": {"strong": 0.5}})
    for policy in (True, False):
        menu = load_menu(checkpoint, routed=policy)
        assert [menu[name].patch_ratio for name in ("off", "light", "balanced", "strong")] == [1, 1, 1, 0.5]
        assert menu["strong"].description.endswith("the vision tower sees 50% of its patches from layer 1 on")
    checkpoint.manifest = checkpoint.manifest.model_copy(update={"patch_ratio": {"off": 0.5}})
    with pytest.raises(CheckpointError, match=r"espalier\.json: patch_ratio off: the levels that may have one are"):
        load_menu(checkpoint)


def test_the_routers_own_work_is_counted(planner):
    expect(planner.router, RISING)
    images, prompt = pictures(2), prompt_of(planner, 2, 7)
    level = planner.menu["balanced"]
    point, expected = level.choose([*RISING, 1.0])
    plan = planner.plan("balanced", "body", prompt, images)
    routing = score_request(planner.router, planner.model, images, text_window(prompt, planner.model.config.image_token_id))
    kept = point.kept(VISUAL)
    assert routing.flops(kept) == 2 * planner.router.config.flops(VISUAL, 7, kept) > 0
    route, visual = make_route(point, images, LAYERS, None, routing)
    assert plan.route == route
    assert torch.equal(plan.visual, visual)
    alone, together = (flops_ratio(planner.model.config, route, len(prompt), own) for own in (0, routing.flops(kept)))
    assert plan.flops_ratio == together > alone
    assert plan.expected_agreement == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("weight", "share"), [(100.0, 1 / 36), (0.0, 1.0)])
def test_auto_is_a_level_like_the_others(planner, weight, share):
    expect(planner.router, RISING)
    prompt = prompt_of(planner, 1, 5)
    planner.menu[AUTO] = replace(planner.menu[AUTO], cost_weight=weight, follow_up_cost_weight=0.0)
    plan = planner.plan(AUTO, "default", prompt, pictures(1))
    assert (plan.level, plan.reason) == (AUTO, "default")
    assert len(plan.route.kept_tokens) == round(VISUAL * share)
    assert planner.plan(AUTO, "default", prompt, pictures(1), follow_up=True).route.dropped == 0


def test_a_router_that_fails_leaves_level_off(routed):
    planner = Planner(load(routed))
    planner.router.token_head.bias.fill_(torch.nan)
    plan = planner.plan("strong", "header", prompt_of(planner, 1, 5), pictures(1))
    assert (plan.level, plan.reason) == ("off", "the router failed at level strong")
    assert plan.route.dropped == 0
    assert (plan.flops_ratio, plan.expected_agreement) == (1.0, None)


def test_policy_router_is_refused_without_one(plain):
    with pytest.raises(ValueError, match="has no router; train one with `espalier route`"):
        Planner(load(plain), "router")
