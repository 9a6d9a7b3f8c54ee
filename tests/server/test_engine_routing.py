"""The engine with a router: what a level gives a question, and what the receipt and the metrics say of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.checkpoint import load, sha256
from models.manifest import read_manifest
from pruning.dynamic.levels import AUTO
from tests.pruning.dynamic.tiny_router import POINTS, RISING, expect, plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.server.tiny import VISUAL, answer, ask, drain, new_engine, submit, value

ROUTED = ("light", "balanced", "strong", AUTO)


def reweigh(engine, level, weight, follow_up=None):
    changed = replace(engine.menu[level], cost_weight=weight, follow_up_cost_weight=weight if follow_up is None else follow_up)
    engine.menu[level] = changed


def test_a_checkpoint_with_a_router_serves_the_same_weights(plain, routed):
    assert sha256(routed / "model.safetensors") == read_manifest(routed).files["model.safetensors"]
    assert load(plain).fingerprint == load(routed).fingerprint
    modes = {path.stat().st_mode for path in routed.iterdir() if path.suffix == ".safetensors"}
    assert modes == {(routed / "espalier.json").stat().st_mode}, "a server that runs as another user reads them all"
    engine = new_engine(load(routed))
    assert engine.token_policy == "router"
    for level in ("off", *ROUTED):
        receipt = answer(engine, 0, level=level).finished.receipt
        assert (receipt.level, receipt.reason) == (level, "body")
        assert (receipt.flops_ratio == 1.0) == (level == "off")
        assert (receipt.expected_agreement is None) == (level == "off")


def test_every_picture_of_a_request_is_routed(routed):
    engine = new_engine(load(routed))
    expect(engine.planner.router, RISING)
    point, expected = engine.menu["balanced"].choose([*RISING, 1.0])
    receipt = answer(engine, 0, 1, level="balanced").finished.receipt
    assert (receipt.visual_tokens, receipt.visual_tokens_total) == (2 * point.kept(VISUAL), 2 * VISUAL)
    assert receipt.expected_agreement == pytest.approx(expected, abs=1e-3)


def test_a_receipt_counts_the_layers_that_are_frozen(routed):
    engine = new_engine(load(routed))
    reweigh(engine, "strong", 0.1)
    points = engine.menu["strong"].operating_points
    frozen = 0
    for place in (place for place, point in enumerate(points) if point.frozen_layers and place < POINTS):
        expect(engine.planner.router, [0.99 if other == place else 0.01 for other in range(POINTS)])
        receipt = answer(engine, 0, level="strong").finished.receipt
        assert receipt.frozen_layers == points[place].frozen_layers > 0
        frozen += receipt.frozen_layers
    assert value(engine, "layers_total", level="strong", outcome="frozen") == frozen > 0


def test_a_question_that_needs_more_is_given_more(routed):
    engine = new_engine(load(routed))
    reweigh(engine, "strong", 0.5)
    given = []
    for hard in (False, True):
        expect(engine.planner.router, [0.02] * (POINTS - 1) + [0.9] if hard else [0.99] * POINTS)
        given.append(answer(engine, 0, level="strong").finished.receipt)
        assert engine.scheduler.used == engine.kv.used == 0
    easy, hard_one = given
    assert easy.visual_tokens < hard_one.visual_tokens
    assert easy.flops_ratio < hard_one.flops_ratio
    assert value(engine, "expected_agreement_ratio_count", level="strong") == 2


def test_a_follow_up_question_chooses_anew_from_all_tokens(routed):
    """What an earlier question let go is kept as features, and a later turn scores them again."""
    engine = new_engine(load(routed))
    expect(engine.planner.router, RISING)
    point, _ = engine.menu["balanced"].choose([*RISING, 1.0])
    answer(engine, 0, text="What color is the star?", level="balanced")
    request = ask(engine, (0,), level="balanced")
    request.prompt = engine.preprocessor.question("How many are there?", [("What color is the star?", "red")])
    engine.submit(request)
    drain(engine)
    second = request.emit.finished.receipt
    assert (second.visual_tokens, second.visual_tokens_total) == (point.kept(VISUAL), VISUAL)
    assert value(engine, "cache_hits_total", cache="image") == 1


def test_no_choice_depends_on_torchs_default_dtype(routed):
    """transformers changes it, for all threads, while another checkpoint loads."""
    engine = new_engine(load(routed))
    alone = answer(engine, 0, level="balanced")
    torch.set_default_dtype(torch.bfloat16)
    try:
        beside = answer(new_engine(load(routed)), 0, level="balanced")
    finally:
        torch.set_default_dtype(torch.float32)
    assert beside.text == alone.text
    assert beside.finished.receipt == alone.finished.receipt


@pytest.mark.parametrize("follow_up", [False, True])
def test_auto_is_a_level_with_two_cost_weights(routed, follow_up):
    engine = new_engine(load(routed))
    expect(engine.planner.router, RISING)
    reweigh(engine, AUTO, 100.0, follow_up=0.0)
    request = replace(ask(engine, level=AUTO), follow_up=follow_up)
    engine.submit(request)
    drain(engine)
    receipt = request.emit.finished.receipt
    assert (receipt.level, receipt.reason) == (AUTO, "body")
    assert (receipt.visual_tokens == VISUAL) == follow_up
    assert value(engine, "requests_total", level=AUTO, outcome="length") == 1
    assert value(engine, "flops_ratio_count", level=AUTO) == value(engine, "expected_agreement_ratio_count", level=AUTO) == 1
    assert not value(engine, "degradations_total", **{"from": AUTO, "to": "off"})


@pytest.mark.parametrize("level", [AUTO, "strong"])
def test_a_level_gives_back_the_memory_that_it_does_not_need(routed, level):
    engine = new_engine(load(routed))
    expect(engine.planner.router, [0.99] * POINTS)
    reweigh(engine, AUTO, 100.0)
    submit(engine, 0, level=level, max_tokens=4)
    engine.step()
    assert engine.scheduler.used == engine.kv.used < VISUAL * 3
    drain(engine)


def test_mixed_with_other_levels_auto_answers_as_it_would_alone(routed):
    engine = new_engine(load(routed, dtype="float32"))
    expect(engine.planner.router, RISING)
    reweigh(engine, AUTO, 100.0)
    alone = [answer(engine, number, level=level).answer for number, level in enumerate((AUTO, "off", "light"))]
    together = [submit(engine, number, level=level)[1] for number, level in enumerate((AUTO, "off", "light"))]
    drain(engine)
    assert [reader.answer for reader in together] == alone


@pytest.mark.parametrize("level", ["balanced", AUTO])
def test_a_router_that_fails_sends_the_request_to_level_off(routed, level, caplog):
    engine = new_engine(load(routed))
    expected = answer(engine, 0, level="off")
    engine.planner.router.token_head.bias.fill_(torch.nan)
    request, reader = submit(engine, 0, level=level)
    drain(engine)
    assert reader.answer == expected.answer
    receipt = reader.finished.receipt
    assert (receipt.level, receipt.reason) == ("off", f"the router failed at level {level}")
    assert value(engine, "degradations_total", **{"from": level, "to": "off"}) == 1
    assert value(engine, "requests_total", level="off", outcome="length") == 2
    (record,) = caplog.records
    assert request.id in record.message
