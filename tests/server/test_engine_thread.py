"""The engine in its own thread: submissions from many, draining, stopping."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from server.errors import ShuttingDown
from server.request import Delta, Failed, Started
from tests.server.tiny import LEVELS, Reader, answer, ask, assert_clean, drain, new_engine, same, submit, total, value
from tests.server.tiny import stepped_engine as stepped_engine
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # a fixture

# ---- the thread


def test_submissions_from_many_threads_all_end_right(tiny):
    lone, engine = new_engine(tiny), new_engine(tiny, max_running=4)
    expected = {(p, level): answer(lone, p, level=level, logprobs=0) for p in (0, 1) for level in LEVELS}
    results: list[tuple[tuple[int, str], Reader]] = []
    engine.start()

    def client(picture: int) -> None:
        for level in LEVELS:
            dropped, _ = submit(engine, 2, max_tokens=400)
            results.append(((picture, level), submit(engine, picture, level=level, logprobs=0)[1]))
            engine.abort(dropped.id)

    threads = [threading.Thread(target=client, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, reader in results:
        reader.wait()
    assert len(results) == 4 * len(LEVELS)
    assert engine.stop()
    for key, reader in results:
        same(reader, expected[key])
    assert_clean(engine)
    assert total(engine, "requests_total", outcome="abort") == 4 * len(LEVELS)


def test_stop_drains_and_refuses(tiny):
    engine = new_engine(tiny, max_running=2)
    assert not engine.alive
    assert not engine.ready
    readers = [submit(engine, max_tokens=20)[1] for _ in range(6)]
    engine.start()
    assert engine.ready
    assert engine.stop()
    assert all(reader.finished.completion_tokens == 20 for reader in readers)
    assert not engine.alive
    assert not engine.ready
    with pytest.raises(ShuttingDown):
        submit(engine)
    assert_clean(engine)


def test_draining_refuses_newcomers_and_serves_who_is_there(tiny):
    engine = new_engine(tiny)
    _, reader = submit(engine)
    engine.drain()
    with pytest.raises(ShuttingDown) as refusal:
        submit(engine)
    assert refusal.value.headers()["Retry-After"] == "1"
    drain(engine)
    assert reader.finished


def test_a_fault_of_the_engine_itself_leaves_nobody_waiting(tiny, monkeypatch):
    engine = new_engine(tiny)
    monkeypatch.setattr(threading, "excepthook", lambda fault: None)
    monkeypatch.setattr(engine, "step", lambda: 1 / 0)
    readers = [submit(engine)[1] for _ in range(3)]
    engine.start()
    for reader in readers:
        reader.wait()
        assert isinstance(reader.end, Failed)
    assert engine.stop()
    assert not engine.alive
    with pytest.raises(ShuttingDown):
        submit(engine)
    assert_clean(engine)


def test_a_late_pass_is_no_hung_one(tiny):
    """The probe gives way after seconds; the process ends only where a pass takes far longer than it should."""
    engine = new_engine(tiny)
    engine.start()
    assert engine.ready
    # seconds that it has taken and that were expected → late, hung
    passes = ((3, 0.1, 0, 0), (4.3, 0.1, 1, 0), (6, 0.1, 1, 1), (20, 9, 0, 0), (30, 9, 1, 0), (30, 0, 1, 0))
    for taken, expected, late, hung in passes:
        engine._watch(time.monotonic() - taken, expected)
        assert (not engine.ready, engine.hung_seconds > 0) == (late, hung), (taken, expected)
    engine._pass = None
    assert engine.stop()


def test_answers_that_outlast_the_grace_are_told_so(tiny):
    """Nobody is left to wait for ever: neither who runs nor who waits."""
    engine = new_engine(tiny, max_running=1)
    step_seen = threading.Event()

    class Slow(Reader):
        def __call__(self, event: Any) -> None:
            super().__call__(event)
            if isinstance(event, Started):
                step_seen.set()
                while engine.ready:  # hundreds of tokens are left to make when the engine is told to stop
                    time.sleep(0.001)

    slow = replace(ask(engine, max_tokens=700), emit=Slow())
    engine.submit(slow)
    _, waiting = submit(engine)
    engine.start()
    assert step_seen.wait(60)
    assert not engine.stop(grace=0)
    assert isinstance(slow.emit.end, Failed)
    assert isinstance(waiting.end, Failed)
    assert any(isinstance(event, Delta) for event in slow.emit.events)
    assert_clean(engine)
    assert value(engine, "requests_total", level="off", outcome="error") == 2


def test_an_aborted_request_leaves_when_nothing_else_happens(tiny):
    """The thread wakes up for an abort alone."""
    engine = new_engine(tiny)
    gone = threading.Event()

    class Leaver(Reader):
        def __call__(self, event: Any) -> None:
            super().__call__(event)
            engine.abort(request.id)
            gone.set()

    request = replace(ask(engine, max_tokens=500), emit=Leaver())
    engine.start()
    engine.submit(request)
    assert gone.wait(60)
    assert engine.stop()
    assert request.emit.end is None
    assert_clean(engine)
