"""Levels whose vision tower merges patches: what is encoded for whom, and what is compared with `off`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from models.checkpoint import Checkpoint
from pruning.dynamic.levels import OperatingPoint
from server.engine import Engine, Limits
from tests.server.tiny import answer, value
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # a fixture


@pytest.fixture(name="merging")
def merging_checkpoint(tiny: Checkpoint) -> Checkpoint:
    return replace(tiny, manifest=tiny.manifest.model_copy(update={"patch_ratio": {"strong": 0.25}}))


@pytest.fixture(name="ratios")
def encoded_ratios(merging: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of each picture that is encoded."""
    ratios, encode = [], merging.model.encode

    def recorded(pixels: Any, layout: Any, ratio: float = 1.0) -> Any:
        ratios.append(ratio)
        return encode(pixels, layout, ratio)

    monkeypatch.setattr(merging.model, "encode", recorded)
    return ratios


def test_features_are_remembered_by_level(merging: Checkpoint, tiny: Checkpoint, ratios: list[float]) -> None:
    engine = Engine(merging, Limits(kv_rows=20_000))
    said = [answer(engine, 0, level=level, logprobs=0) for level in ("off", "strong", "strong", "light", "off")]
    assert ratios == [1.0, 0.25]
    assert said[1].answer == said[2].answer and said[0].answer == said[4].answer
    plain = Engine(tiny, Limits(kv_rows=20_000))
    assert said[0].answer == answer(plain, 0, level="off").answer
    logprobs = [[one.logprob for one in made.logprobs] for made in (said[1], answer(plain, 0, level="strong", logprobs=0))]
    assert logprobs[0] != logprobs[1], "merged patches show"


def test_answers_are_checked_against_the_whole_tower(merging: Checkpoint, tiny: Checkpoint, ratios: list[float]) -> None:
    engine, plain, equal = Engine(merging, Limits(kv_rows=20_000), shadow=1.0), Engine(tiny, Limits(kv_rows=20_000)), 0
    for tokens in (1, 2, 8):
        equal += answer(engine, 0, level="strong", max_tokens=tokens).answer == answer(plain, 0, max_tokens=tokens).answer
        while not engine._shadow.idle:
            engine.step()
    assert value(engine, "shadow_compared_total", level="strong") == 3
    assert value(engine, "shadow_equal_total", level="strong") == equal
    assert ratios[:2] == [0.25, 1.0], "the answer's, and then the check's"
    assert value(engine, "cache_queries_total", cache="image") == 3, "a check counts nowhere else"


def test_where_the_router_fails_the_tower_is_whole(
    merging: Checkpoint, ratios: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(merging, Limits(kv_rows=20_000))
    points = (OperatingPoint(1 / 6), OperatingPoint())
    engine.menu["strong"] = replace(engine.menu["strong"], operating_points=points)  # a router's, that reserves the whole model
    plan = engine.planner.plan
    monkeypatch.setattr(engine.planner, "plan", lambda level, reason, *rest, **more: plan("off", "the router failed", *rest))
    made = answer(engine, 0, level="strong")
    assert made.finished.receipt.level == "off" and ratios == [0.25, 1.0]
    monkeypatch.undo()
    assert made.answer == answer(engine, 0, level="off").answer
