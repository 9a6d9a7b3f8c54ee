"""Deadlines: what cannot make them is refused at once, what waited too long ends, and what may run cheaper does."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import httpx
import pytest

from server.deadline import Deadline, read_deadline
from server.engine import Engine
from server.errors import DeadlineMissed, InvalidRequest
from server.request import Failed
from tests.server.client import ask, body, check_error, connect, image_part
from tests.server.client import client as client
from tests.server.fake_engine import FakeEngine
from tests.server.tiny import answer, drain, new_engine, submit, total
from tests.server.tiny import ask as ask_engine
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # a fixture

pytestmark = pytest.mark.anyio
HEADERS = ("X-Request-Deadline-Ms", "x-slo-ttft-ms")
CHEAPER = {"meet_deadline": True}


def test_a_deadline_counts_from_arrival() -> None:
    assert read_deadline({"other": "1"}, 5.0) is None
    deadline = read_deadline({"X-Request-Deadline-Ms": "2500", "x-slo-ttft-ms": "500"}, 5.0)
    assert deadline == Deadline(first_token=5.5, answer=7.5)
    assert deadline.late_by(5.0, 0.25, 3.0) == 0.5
    assert deadline.late_by(5.0, 0.75, 1.0) == 0.25
    assert deadline.late_by(5.0, 0.25, 1.0) <= 0


@pytest.mark.parametrize("value", ["", "0", "-5", "1.5", "soon", "²", "9" * 5000, "86400001"])
@pytest.mark.parametrize("name", HEADERS)
def test_a_malformed_deadline_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as refusal:
        read_deadline({name: value}, 0.0)
    assert refusal.value.param == name and len(refusal.value.message) < 200


def test_times_grow_with_what_runs_and_waits(tiny: Any) -> None:
    engine = new_engine(tiny, max_running=1)
    assert predicted(engine) == (0, 0), "nothing is known yet"
    answer(engine, 0)
    first, whole = predicted(engine)
    assert 0 < first < whole
    submit(engine, 1)
    submit(engine, 2)
    behind, _ = predicted(engine)
    assert behind > 2 * first
    engine.step()
    assert first < predicted(engine)[0]
    drain(engine)


def predicted(engine: Engine, n: int = 1) -> tuple[float, float]:
    request = ask_engine(engine)
    return engine.predict_times("off", len(request.prompt), [image.picture.layout for image in request.images], 8, n)


def test_choices_that_find_no_place_take_their_turn(tiny: Any) -> None:
    engine = new_engine(tiny, max_running=2)
    answer(engine, 0)
    (first, whole), (first_of_2, both), (first_of_4, four) = (predicted(engine, n) for n in (1, 2, 4))
    assert first < first_of_2 == first_of_4, "two run at once, and each runs the prompt"
    assert both - first_of_2 == pytest.approx(whole - first)
    assert four > both + (whole - first)


def test_who_waits_too_long_is_told(tiny: Any) -> None:
    engine = new_engine(tiny, max_running=1)
    _, first = submit(engine)
    late = replace(ask_engine(engine), deadline=Deadline(answer=time.monotonic() - 1))
    patient = replace(ask_engine(engine), deadline=Deadline(answer=time.monotonic() + 1000))
    for request in (late, patient):
        engine.submit(request)
    engine.step()
    (event,) = late.emit.events
    assert isinstance(event, Failed) and isinstance(event.refusal, DeadlineMissed)
    drain(engine)
    assert first.finished and patient.emit.finished
    assert total(engine, "requests_total") == 2, "it was refused, and did not end"


async def test_an_idle_server_tries_whatever_it_expects(tiny: Any) -> None:
    """Or one slow pass would have it refuse for ever: nothing is learned from refusals."""
    engine = new_engine(tiny)
    answer(engine)
    engine._work.observe_pass(1e9, prefill_rows=1, new_tokens=0)
    plain, may_change = (body(image_part(), model=engine.model_name, max_tokens=2, pruning=pruning) for pruning in ({}, CHEAPER))
    headers = {"X-Request-Deadline-Ms": "60000"}
    async with connect(engine) as client:
        submit(engine)
        for payload in (plain, may_change):
            assert check_error(await ask(client, payload, headers=headers), 429)["code"] == "deadline_missed"
        drain(engine)
        engine.start()
        found = [(await ask(client, payload, headers=headers)).json()["pruning"] for payload in (plain, may_change)]
    assert [(receipt["level"], receipt["reason"]) for receipt in found] == [("off", "default"), ("thin", "deadline")]
    assert engine.stop()


class Busy(FakeEngine):
    """A first token takes a second at `off`, half as long at `light`, and so on; something always runs."""

    idle = False

    def predict_times(
        self, level: str, prompt_tokens: int, images: list[Any], max_tokens: int, n: int = 1
    ) -> tuple[float, float]:
        first = self.menu[level].visual_ratio
        return first, first + n

    def cheaper(self, level: str) -> list[str]:
        return list(self.menu)[list(self.menu).index(level) + 1 :]


@pytest.fixture(name="engine")
def busy_engine() -> Busy:
    return Busy()


@pytest.mark.parametrize("headers", [{"X-Request-Deadline-Ms": "1500"}, {"x-slo-ttft-ms": "500"}])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_would_be_late_is_refused(client: httpx.AsyncClient, engine: Busy, headers: Any, stream: bool) -> None:
    response = await ask(client, body(image_part(), stream=stream), headers=headers)
    assert check_error(response, 429)["code"] == "deadline_missed"
    assert 400 < int(response.headers["retry-after-ms"]) < 1000
    assert not engine.submitted
    assert 'espalier_rejections_total{reason="deadline_missed"} 1.0' in (await client.get("/metrics")).text
    assert (await ask(client, headers={"X-Request-Deadline-Ms": "2500"})).status_code == 200


async def test_choices_count_for_a_deadline(client: httpx.AsyncClient) -> None:
    headers = {"X-Request-Deadline-Ms": "2500"}
    assert (await ask(client, body(image_part(), n=1), headers=headers)).status_code == 200
    check_error(await ask(client, body(image_part(), n=2), headers=headers), 429)


async def test_a_cheaper_level_makes_it_where_allowed(client: httpx.AsyncClient, engine: Busy) -> None:
    limit = engine.menu["balanced"].visual_ratio + 0.2
    headers = {"x-slo-ttft-ms": f"{limit * 1000:.0f}"}
    payload = body(image_part(), pruning=CHEAPER)
    receipt = (await ask(client, payload, headers=headers)).json()["pruning"]
    assert (receipt["level"], receipt["reason"]) == ("balanced", "deadline")
    assert (await ask(client, payload, headers={"x-slo-ttft-ms": "1"})).status_code == 429


async def test_a_malformed_header_is_a_400(client: httpx.AsyncClient) -> None:
    assert check_error(await ask(client, headers={"x-slo-ttft-ms": "soon"}), 400)["param"] == "x-slo-ttft-ms"


async def test_a_deadline_that_passes_in_the_queue_is_a_429(client: httpx.AsyncClient, engine: Busy) -> None:
    engine.failure = Failed("too late", DeadlineMissed("too late", 0.5))
    response = await ask(client)
    assert check_error(response, 429)["code"] == "deadline_missed" and response.headers["retry-after-ms"] == "500"
