"""Live agreement: which answers are checked against level `off`, when, and what comes of it."""

from __future__ import annotations

from typing import Any

import pytest

from models.checkpoint import Checkpoint
from server.engine import Engine, Limits
from server.shadow import MAX_TOKENS, MAX_WAITING
from tests.server.tiny import THIN, answer, ask, drain, submit, total, value
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # a fixture

QUESTIONS = ("What color is the star?", "Read the sign.", "Describe the picture.", "How many?", "Which is the largest?")


def shadowed(checkpoint: Checkpoint, share: float = 1.0) -> Engine:
    engine = Engine(checkpoint, Limits(kv_rows=20_000), shadow=share)
    engine.menu[THIN.name] = THIN
    return engine


def check_all(engine: Engine) -> None:
    """Steps of an engine that nobody asks."""
    while not engine._shadow.idle:
        engine.step()
        engine.kv.check_integrity()
    assert engine.kv.used == 0


def counted(engine: Engine, level: str) -> tuple[float, float]:
    return value(engine, "shadow_equal_total", level=level), value(engine, "shadow_compared_total", level=level)


def test_equal_and_other_answers_are_told_apart(tiny: Checkpoint) -> None:
    engine, plain = shadowed(tiny), Engine(tiny, Limits(kv_rows=20_000))
    equal = 0
    for question in QUESTIONS:
        for tokens in (1, 8):
            made = answer(engine, 0, text=question, level="strong", max_tokens=tokens)
            equal += made.answer == answer(plain, 0, text=question, max_tokens=tokens).answer
            check_all(engine)
    assert 0 < equal < 10, "else this compares nothing"
    assert counted(engine, "strong") == (equal, 10)


def test_a_text_answers_alike_at_every_level(tiny: Checkpoint) -> None:
    engine = shadowed(tiny)
    submit_text(engine, "strong")
    drain(engine)
    check_all(engine)
    assert counted(engine, "strong") == (1, 1)


def submit_text(engine: Engine, level: str) -> None:
    request = ask(engine, (), level=level)
    engine.submit(request)


@pytest.mark.parametrize(
    ("level", "sampling"), [("off", {}), ("strong", {"temperature": 1.0}), ("strong", {"max_tokens": MAX_TOKENS + 1})]
)
def test_what_cannot_be_compared_is_not(tiny: Checkpoint, level: str, sampling: dict[str, Any]) -> None:
    engine = shadowed(tiny)
    answer(engine, 0, level=level, **sampling)
    assert engine._shadow.idle


def test_a_check_gives_way_and_counts_nowhere_else(tiny: Checkpoint) -> None:
    engine = shadowed(tiny)
    answer(engine, 0, level="strong")
    engine.step()
    engine.step()
    assert engine.kv.used, "a check is under way"
    before = {name: total(engine, name) for name in ("requests_total", "prompt_tokens_total", "engine_busy_seconds_total")}
    _, reader = submit(engine, 0)
    engine.step()
    assert len(engine._running) == 1 and engine.kv.used == sum(next(iter(engine._running.values())).cache.capacity)
    drain(engine)
    assert reader.finished
    assert counted(engine, "strong") == (0, 0), "dropped"
    assert total(engine, "requests_total") == before["requests_total"] + 1
    answer(engine, 0, level="strong")
    before = {name: total(engine, name) for name in before}
    check_all(engine)
    assert {name: total(engine, name) for name in before} == before
    assert counted(engine, "strong")[1] == 1


def test_few_wait(tiny: Checkpoint) -> None:
    engine = shadowed(tiny)
    for _ in range(MAX_WAITING + 4):
        submit(engine, 0, level="thin", max_tokens=1)
    drain(engine)
    check_all(engine)
    assert counted(engine, "thin")[1] == MAX_WAITING


def test_the_sample_is_a_share_and_seeded(tiny: Checkpoint) -> None:
    taken = []
    for _ in range(2):
        engine = shadowed(tiny, 0.3)
        for _ in range(20):
            answer(engine, 0, level="strong", max_tokens=1)
            check_all(engine)
        taken.append(counted(engine, "strong"))
    assert taken[0] == taken[1] and 1 <= taken[0][1] <= 15
    engine = shadowed(tiny, 0.0)
    answer(engine, 0, level="strong")
    assert engine._shadow.idle


def test_forgotten_pictures_are_not_encoded_again(tiny: Checkpoint) -> None:
    engine = Engine(tiny, Limits(kv_rows=20_000, cached_images=0), shadow=1.0)
    answer(engine, 0, level="strong")
    check_all(engine)
    assert counted(engine, "strong") == (0, 0)
    assert value(engine, "cache_queries_total", cache="image") == 1
