"""Refusals, requests that are given up, and failures: each stays its own, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import server.answering
import server.batch
from models.forward import SequenceInput, forward
from server.engine import Engine
from server.errors import ContextTooLong, Overloaded
from server.request import Failed
from tests.server.tiny import (
    LAYERS,
    LEVELS,
    VISUAL,
    Reader,
    answer,
    ask,
    assert_clean,
    drain,
    new_engine,
    same,
    spoil,
    submit,
    value,
)
from tests.server.tiny import stepped_engine as stepped_engine
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # a fixture

# ---- refusals


def test_a_full_queue_says_when_to_come_back(tiny):
    engine = new_engine(tiny, max_running=1, max_waiting=2)
    readers = [submit(engine)[1] for _ in range(2)]
    with pytest.raises(Overloaded) as refusal:
        submit(engine)
    assert refusal.value.retry_after >= 1
    engine.step()  # one runs, one waits: there is a place to wait again
    readers.append(submit(engine)[1])
    drain(engine)
    assert all(reader.finished for reader in readers)


def test_without_a_queue_a_free_place_is_still_a_place(tiny):
    engine = new_engine(tiny, max_running=1, max_waiting=0)
    assert answer(engine).finished
    submit(engine)
    with pytest.raises(Overloaded):
        submit(engine)
    drain(engine)


def test_what_never_fits_is_refused_at_once(tiny):
    engine = new_engine(tiny, kv_rows=LAYERS * 200)
    with pytest.raises(ContextTooLong, match="KV cache") as refusal:
        submit(engine, max_tokens=200)
    assert refusal.value.param == "max_tokens"
    assert answer(engine, max_tokens=8).finished
    assert answer(engine, max_tokens=100, level="strong").finished, "a level that keeps less may still fit"


def test_a_prompt_longer_than_the_context_is_refused(engine):
    with pytest.raises(ContextTooLong, match="1024") as refusal:
        submit(engine, *range(8))
    assert refusal.value.param == "messages"
    assert_clean(engine)


def test_an_id_is_used_once_at_a_time(engine):
    request, reader = submit(engine)
    with pytest.raises(ValueError, match="in use"):
        engine.submit(request)
    drain(engine)
    engine.submit(replace(request, emit=Reader()))
    drain(engine)
    assert reader.finished


def test_an_unknown_default_level_is_an_error_at_the_start(tiny):
    with pytest.raises(ValueError, match="'most' is not one of off, light"):
        Engine(tiny, default_level="most")


# ---- giving up


def test_aborting_waiting_and_running_requests_frees_everything(tiny):
    engine = new_engine(tiny, max_running=2)
    (stays, kept), (runs, gone), (waits, unseen) = (submit(engine, picture) for picture in (0, 1, 2))
    engine.step()
    engine.step()
    assert {*engine.scheduler.running} == {stays.id, runs.id}
    before = list(gone.events)
    engine.abort(runs.id)
    engine.abort(waits.id)
    engine.abort(waits.id)
    engine.abort("nobody")
    engine.step()
    engine.kv.check_integrity()
    assert {*engine.scheduler.running} == {stays.id}
    assert not engine.scheduler.waiting
    drain(engine)
    assert (gone.events, unseen.events) == (before, [])
    same(kept, answer(new_engine(tiny), 0))
    assert value(engine, "requests_total", level="off", outcome="abort") == 2


def test_a_late_abort_does_not_hit_the_next_of_its_name(engine):
    """The reader gives up while it is handed its last event."""

    class Leaver(Reader):
        def __call__(self, event: Any) -> None:
            super().__call__(event)
            engine.abort(request.id)

    request = replace(ask(engine, max_tokens=1), emit=Leaver())
    engine.submit(request)
    engine.step()
    assert_clean(engine)
    again = replace(request, emit=Reader())
    engine.submit(again)
    drain(engine)
    assert again.emit.finished


def test_a_reader_that_breaks_is_forgotten_and_others_go_on(engine):
    def broken(event: Any) -> None:
        raise RuntimeError("the loop is closed")

    engine.submit(replace(ask(engine, (0,)), emit=broken))
    _, reader = submit(engine, 1, logprobs=0)
    engine.step()
    engine.step()
    assert len(engine.scheduler.running) == 1
    drain(engine)
    same(reader, answer(engine, 1, logprobs=0))


# ---- failures


@pytest.mark.parametrize(
    ("pixels", "level", "cause"),
    [
        (torch.zeros(3, 8, 8), "off", RuntimeError),
        (torch.full((3, 96, 96), torch.nan), "off", ArithmeticError),
        (torch.full((3, 96, 96), torch.nan), "strong", ValueError),
    ],
    ids=["an encoder that raises", "logits that are not numbers", "a route that cannot be made"],
)
def test_a_picture_that_breaks_the_model_fails_its_request_alone(engine, caplog, pixels, level, cause):
    readers = [submit(engine, 0, logprobs=0)[1]]
    engine.step()
    bad = spoil(ask(engine, (1,), level=level), pixels)
    engine.submit(bad)
    readers.append(submit(engine, 2, level="strong", logprobs=0)[1])
    drain(engine)
    assert isinstance(bad.emit.end, Failed)
    assert len(bad.emit.events) == 1
    same(readers[0], answer(engine, 0, logprobs=0))
    same(readers[1], answer(engine, 2, level="strong", logprobs=0))
    assert value(engine, "requests_total", level=level, outcome="error") == 1
    (record,) = caplog.records
    assert bad.id in record.message, "the log says which request failed"
    assert record.exc_info[0] is cause, "and why"


@pytest.mark.parametrize("when", [0, 1, 3])
def test_a_pass_that_raises_for_one_request_fails_it_alone(engine, monkeypatch, caplog, when):
    """In its prefill or while it decodes, and after the pass has written everybody's keys and values."""
    expected = {level: answer(engine, 0, level=level, logprobs=0) for level in LEVELS}
    victim = engine.menu["balanced"].operating_points[0].kept(VISUAL)

    def flaky(model: Any, batch: list[SequenceInput], *rest: Any) -> torch.Tensor:
        logits = forward(model, batch, *rest)
        if any(len(one.route.kept_tokens) == victim and max(one.cache.lengths) > reach for one in batch):
            raise RuntimeError("a broken pass")
        return logits

    requests = {level: submit(engine, 0, level=level, logprobs=0) for level in LEVELS}
    reach = len(requests["balanced"][0].prompt) - (VISUAL - victim) + when - 1
    monkeypatch.setattr(server.batch, "forward", flaky)
    drain(engine)
    for level, (_, reader) in requests.items():
        if level == "balanced":
            assert isinstance(reader.end, Failed)
            assert len(reader.logprobs) == when
        else:
            same(reader, expected[level])


def test_an_id_outside_the_vocabulary_fails_its_request_alone(engine, caplog):
    request = ask(engine)
    bad = replace(request, prompt=[*request.prompt, 10**6])
    engine.submit(bad)
    _, reader = submit(engine)
    drain(engine)
    assert isinstance(bad.emit.end, Failed)
    assert reader.finished


def test_a_failure_while_handing_out_fails_its_request_alone(engine, monkeypatch, caplog):
    def broken(*given: Any) -> int:
        raise RuntimeError("no luck")

    monkeypatch.setattr(server.answering, "sample", broken)
    _, unlucky = submit(engine, 0, temperature=1.0)
    _, reader = submit(engine, 1)
    drain(engine)
    assert isinstance(unlucky.end, Failed)
    assert reader.finished
