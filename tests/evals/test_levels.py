"""The levels' table: what agreement means, what `auto` takes, and what it is held against."""

from __future__ import annotations

import json

import pytest

from evals import levels, routing_report
from models.checkpoint import load
from pruning.dynamic.levels import AUTO, PRUNED
from pruning.dynamic.router_file import load_router
from tests.pruning.dynamic.tiny_router import expect, plain_checkpoint, routed_checkpoint  # noqa: F401


@pytest.fixture(scope="module", name="found")
def found_levels(routed):
    checkpoint = load(routed)
    checkpoint.manifest.router["auto"].update(first={"price": 100.0}, later={"price": 100.0})
    router = load_router(checkpoint)
    expect(router, [0.99] * router.shape.rungs)
    return levels.run(checkpoint, router, pictures=2, split="validation")


def test_off_agrees_with_itself_first_and_second_in_a_chat(found):
    for place in ("alone", "second"):
        off = found["levels"][place]["off"]
        assert (off["agreement"], off["agreement_interval"], off["flops_ratio"]) == (1.0, [1.0, 1.0], 1.0)
        assert set(found["levels"][place]) >= {"off", AUTO, *PRUNED}
        assert off["n"] == found["levels"][place][AUTO]["n"] > 10


def test_auto_is_the_level_that_it_takes(found):
    assert found["taken"] == {f"{place}/{PRUNED[0]}": found["levels"][place]["off"]["n"] for place in ("alone", "second")}
    for place in ("alone", "second"):
        assert found["levels"][place][AUTO] == found["levels"][place][PRUNED[0]]


@pytest.mark.parametrize("against", ["against_alike", "against_levels"])
def test_auto_is_held_against_the_cheapest_budget_that_agrees_as_often(found, against):
    alone, levels = found["levels"]["alone"], set(PRUNED)
    others = {name for name in alone if name != AUTO and (name == "off" or (name in levels) == (against == "against_levels"))}
    equal = {name: alone[name]["flops_ratio"] for name in others if alone[name]["agreement"] >= alone[AUTO]["agreement"]}
    assert found[against]["flops_ratio"] == min(equal.values())
    assert found[against]["level"] in equal
    assert found[against]["saved"] == pytest.approx(1 - alone[AUTO]["flops_ratio"] / min(equal.values()), abs=2e-4)


def test_second_in_a_chat_auto_is_held_against_itself_alone(found):
    found_at = {
        place: {name: found["levels"][place][name]["agreement"] for name in (AUTO, "off")} for place in ("alone", "second")
    }
    lost = {place: one["off"] - one[AUTO] for place, one in found_at.items()}
    assert found["against_alone"]["agreement"] == pytest.approx(lost["alone"] - lost["second"], abs=2e-4)
    low, high = found["against_alone"]["agreement_interval"]
    assert low <= found["against_alone"]["agreement"] <= high


def test_the_page_shows_the_levels(found, tmp_path):
    common = {"checkpoint": "embedded", "split": "test", "pictures": 2, "questions": 18, "seed": 0}
    off = common | {"policy": "off", "budget": "off", "keep": 144, "skip": 0, "accuracy": 0.9, "flops_ratio": 1.0}
    (tmp_path / "runs.jsonl").write_text(json.dumps(off) + "\n")
    (tmp_path / "levels.jsonl").write_text(json.dumps(common | found) + "\n")
    routing_report.main(tmp_path / "runs.jsonl", tmp_path / "page.md", tmp_path / "levels.jsonl")
    page = (tmp_path / "page.md").read_text()
    assert "| off | 100.0% (100.0–100.0) |" in page
    assert "- Router 0: `auto` agrees at" in page
    assert "the same for all questions" in page
    assert "Second in a chat" in page
