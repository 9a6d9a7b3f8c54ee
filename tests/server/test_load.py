"""Which level requests get that name none, while little or much waits."""

from __future__ import annotations

import pytest

from models.checkpoint import Checkpoint
from server.engine import Engine, Limits
from server.load import WINDOW_S, DefaultLevel
from tests.server.tiny import answer, ask, drain, new_engine, value
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # a fixture

LEVELS = ("off", "light", "balanced")


def test_pressure_goes_down_one_level_a_window_and_no_further() -> None:
    default = DefaultLevel(LEVELS, 0.0)
    assert default.choose(9.0, WINDOW_S / 2) == "off", "a moment is no pressure"
    found = [default.choose(9.0, WINDOW_S * n) for n in (1, 1.5, 2, 3, 4)]
    assert found == ["light", "light", "balanced", "balanced", "balanced"]


def test_between_pressure_and_calm_it_stays() -> None:
    default = DefaultLevel(LEVELS, 0.0)
    default.choose(9.0, WINDOW_S)
    assert [default.choose(0.8, WINDOW_S * n) for n in (2, 3, 4)] == ["light"] * 3
    assert default.choose(0.2, WINDOW_S * 5) == "off"


def test_a_long_calm_ends_it_at_once() -> None:
    default = DefaultLevel(LEVELS, 0.0)
    for n in (1, 2):
        default.choose(9.0, WINDOW_S * n)
    assert default.choose(0.0, WINDOW_S * 100) == "off"


def test_an_engine_under_load_gives_cheaper_levels(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("server.engine.time.monotonic", lambda: now[0])
    engine = Engine(tiny, Limits(kv_rows=20_000, max_running=1), degrade=True)
    assert engine.current_default() == "off"
    for _ in range(3):
        engine.submit(ask(engine))
    now[0] = WINDOW_S + 1
    assert engine.current_default() == "light"
    cheaper = ask(engine, level="light")
    cheaper.reason = "load"
    engine.submit(cheaper)
    drain(engine)
    assert cheaper.emit.finished.receipt.reason == "load"
    assert value(engine, "degradations_total", **{"from": "off", "to": "light"}) == 1


def test_who_waited_gets_the_level_of_now(tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("server.engine.time.monotonic", lambda: now[0])
    engine = Engine(tiny, Limits(kv_rows=20_000, max_running=1), degrade=True)
    first, waiting, asked = ask(engine), ask(engine), ask(engine)
    first.reason = waiting.reason = "default"
    for request in (first, waiting, asked):
        engine.submit(request)
    engine.step()
    now[0] = WINDOW_S + 1
    drain(engine)
    found = [(one.emit.finished.receipt.level, one.emit.finished.receipt.reason) for one in (first, waiting, asked)]
    assert found == [("off", "default"), ("light", "load"), ("off", "body")]


def test_pictures_at_hand_say_nothing_of_new_ones(tiny: Checkpoint) -> None:
    engine = new_engine(tiny)
    answer(engine, 0, max_tokens=1)
    learned = engine._work.visual_token.value
    for _ in range(3):
        answer(engine, 0, max_tokens=1)
    assert engine._work.visual_token.value == learned > 0


def test_without_being_asked_to_the_default_stays(tiny: Checkpoint) -> None:
    engine = Engine(tiny, Limits(kv_rows=20_000, max_running=1))
    for _ in range(3):
        engine.submit(ask(engine))
    engine._default._since -= 100
    assert engine.current_default() == "off"
