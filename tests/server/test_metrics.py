"""What `/metrics` tells: every series from the start, requests counted once, load at the levels asked for."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace
from typing import Any

import pytest
import torch
from prometheus_client import generate_latest

from models.checkpoint import load
from server.deadline import Deadline
from server.engine import Engine
from server.errors import InvalidRequest
from server.load import WorkRate
from server.metrics import OUTCOMES
from server.request import ParentRequest
from server.scheduler import ScheduledRequest, Scheduler
from server.served import Served
from server.structured import Constraint
from tests.pruning.dynamic.tiny_router import POINTS, expect, plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.server.tiny import Reader, ask, drain, new_engine, submit, total, value
from tests.server.tiny import stepped_engine as stepped_engine  # fixtures
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint


def page(engine: Engine) -> str:
    return generate_latest(Served([engine]).metrics).decode()


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool")
def test_promtool_finds_nothing_to_mend(engine: Engine) -> None:
    submit(engine)
    drain(engine)
    checked = subprocess.run(["promtool", "check", "metrics"], input=page(engine), capture_output=True, text=True)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_series_are_there_before_anything_happens(engine: Engine) -> None:
    read = engine.metrics.registry.get_sample_value
    for level in ("off", "strong"):
        assert all(read("espalier_requests_total", {"level": level, "outcome": outcome}) == 0 for outcome in OUTCOMES)
        for name in ("request_seconds", "time_to_first_token_seconds", "inter_token_seconds", "flops_ratio"):
            assert read(f"espalier_{name}_count", {"level": level}) == 0
    for reason in ("overloaded", "payload_too_large", "invalid_request_error", "context_length_exceeded"):
        assert f'espalier_rejections_total{{reason="{reason}"}} 0.0' in page(engine)
    assert read("espalier_saturation_ratio") == read("espalier_backlog_seconds") == 0
    assert 'espalier_build_info{checkpoint="fp_' in page(engine)
    assert "\nprocess_resident_memory_bytes " in page(engine)


def test_routed_levels_have_their_own_series_from_the_start(routed) -> None:
    read = new_engine(load(routed)).metrics.registry.get_sample_value
    for level in ("light", "balanced", "strong", "auto"):
        assert read("espalier_expected_agreement_ratio_count", {"level": level}) == 0
        assert read("espalier_degradations_total", {"from": level, "to": "off"}) == 0
    assert read("espalier_degradations_total", {"from": "off", "to": "off"}) is None


def test_buckets_cover_what_happens(engine: Engine) -> None:
    read = engine.metrics.registry.get_sample_value
    for name in ("request_seconds", "time_to_first_token_seconds", "inter_token_seconds"):
        for bound in ("0.005", "60.0"):
            assert read(f"espalier_{name}_bucket", {"level": "off", "le": bound}) == 0
    engine.metrics.flops.labels("off").observe(1.3)  # all tokens, and the router on top of a tiny model
    bounded = [read("espalier_flops_ratio_bucket", {"level": "off", "le": bound}) for bound in ("1.0", "1.25", "1.5", "+Inf")]
    assert bounded == [0, 0, 1, 1]


def choices(engine: Engine, count: int) -> list[Reader]:
    parent, one = ParentRequest(count), ask(engine, level="strong", max_tokens=3)
    readers = [Reader() for _ in range(count)]
    engine.submit(
        *(replace(one, id=f"{one.id}-{index}", emit=reader, parent=parent, timings={}) for index, reader in enumerate(readers))
    )
    return readers


def test_several_choices_are_one_request_and_one_prompt(engine: Engine) -> None:
    readers = choices(engine, 3)
    drain(engine)
    prompt, made = readers[0].finished.prompt_tokens, sum(reader.finished.completion_tokens for reader in readers)
    assert total(engine, "requests_total") == value(engine, "requests_total", level="strong", outcome="length") == 1
    assert (value(engine, "prompt_tokens_total"), value(engine, "generated_tokens_total")) == (prompt, made)
    kept, dropped = (value(engine, "visual_tokens_total", level="strong", outcome=outcome) for outcome in ("kept", "dropped"))
    assert (kept, kept + dropped) == (24, 144)
    for name in ("request_seconds", "time_to_first_token_seconds", "flops_ratio"):
        assert value(engine, f"{name}_count", level="strong") == 1
    assert value(engine, "stage_seconds_count", stage="queue") == 1
    assert value(engine, "inter_token_seconds_count", level="strong") == made - 3


def test_a_request_ends_as_badly_as_its_worst_choice(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    choices(engine, 2)
    engine.step()
    monkeypatch.setattr(engine, "_take", fail_once(engine._take))
    drain(engine)
    assert total(engine, "requests_total") == value(engine, "requests_total", level="strong", outcome="error") == 1


def fail_once(act):
    failures = [RuntimeError("no luck")]

    def failing(*args):
        if failures:
            raise failures.pop()
        act(*args)

    return failing


def test_a_request_refused_half_way_did_not_end(tiny) -> None:
    engine = new_engine(tiny, max_running=1)
    choices(engine, 3)
    engine.step()
    for request in engine._waiting():
        request.deadline = Deadline(answer=0.0)
    engine.step()
    for request in list(engine._requests):
        engine.abort(request)
    drain(engine)
    assert total(engine, "requests_total") == 0


def test_an_answer_refused_in_its_middle_ended_in_error(engine: Engine) -> None:
    class Narrow(Constraint):
        def __init__(self) -> None:
            self.taken = 0

        def allowed(self, size: int) -> Any:
            return torch.ones(size, dtype=torch.bool)

        def take(self, token: int) -> bool:
            self.taken += 1
            if self.taken > 2:
                raise InvalidRequest("the schema is too large to be followed")
            return False

    request = replace(ask(engine), constraint=Narrow())
    engine.submit(request)
    drain(engine)
    assert request.emit.end.refusal
    assert total(engine, "requests_total", outcome="error") == 1


def test_saturation_counts_places_and_memory() -> None:
    scheduler = Scheduler(budget=100, max_running=4, max_waiting=9, max_prefill=100)
    for number, rows in enumerate((10, 10)):
        scheduler.submit(ScheduledRequest(str(number), rows, rows))
    assert scheduler.saturation == 0.5
    scheduler.admit()
    assert scheduler.saturation == 0.5
    scheduler.submit(ScheduledRequest("large", 90, 90))
    assert scheduler.saturation == pytest.approx(1.1)


def test_the_backlog_is_smaller_at_a_cheaper_level(engine: Engine) -> None:
    submit(engine, max_tokens=3)
    drain(engine)
    backlog = {}
    for level in ("off", "strong"):
        request, _ = submit(engine, level=level, max_tokens=3)
        backlog[level] = value(engine, "backlog_seconds")
        engine.abort(request.id)
        drain(engine)
    assert 0 < backlog["strong"] < backlog["off"]
    assert value(engine, "backlog_seconds") == 0
    assert value(engine, "engine_busy_seconds_total") > 0


def test_work_is_learned_for_prompts_and_for_new_tokens_apart() -> None:
    rate = WorkRate()
    assert rate.prompt_seconds(1000, 9) == rate.answer_seconds(10) == 0, "nothing is known yet"
    rate.observe_pass(0.2, prefill_rows=0, new_tokens=2)
    rate.observe_pass(1.2, prefill_rows=1000, new_tokens=1)
    rate.visual_token.observe(0.3, 3)
    rate.observe_answer(4)
    assert rate.prompt_seconds(1000, 9) == pytest.approx(1.0 + 0.9)
    assert rate.answer_seconds(10) == pytest.approx(4 * 0.1)
    assert rate.answer_seconds(1) == pytest.approx(0.1), "no more tokens than the request allows"


def test_a_picture_at_hand_is_a_hit_of_two_queries(engine: Engine) -> None:
    for _ in range(2):
        submit(engine, 3)
        drain(engine)
    assert (value(engine, "cache_queries_total", cache="image"), value(engine, "cache_hits_total", cache="image")) == (2, 1)


def test_what_the_router_chooses_is_no_degradation(routed) -> None:
    engine = new_engine(load(routed))
    expect(engine.planner.router, [0.99] * POINTS)
    submit(engine, level="auto")
    drain(engine)
    assert total(engine, "degradations_total") == 0
    assert total(engine, "requests_total", level="auto") == 1
