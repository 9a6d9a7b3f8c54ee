"""The soak's own judgement: what it counts as ended, and what it says of memory."""

from __future__ import annotations

import json
from random import Random

import pytest

from benchmarks.soak import WRONG, Soak, ask, has_ended, summarise, waiting_and_running
from server.errors import Overloaded
from tests.server.client import connect
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
CHUNK = 'data: {"choices": [{"finish_reason": "stop"}]}'


@pytest.mark.parametrize(
    ("body", "streamed", "status", "ended"),
    [
        (f"{CHUNK}\n\ndata: [DONE]\n\n", True, 200, True),
        (f"{CHUNK}\n\n", True, 200, False),
        ('data: {"error": {"message": "gone"}}\n\ndata: [DONE]\n\n', True, 200, False),
        ('{"choices": [{"finish_reason": "length"}]}', False, 200, True),
        ('{"choices": [{"finish_reason": null}]}', False, 200, False),
        ('{"error": {"message": "full"}}', False, 429, True),
    ],
)
def test_an_end_is_told_from_a_cut(body: str, streamed: bool, status: int, ended: bool) -> None:
    assert has_ended(body.encode(), streamed=streamed, status=status) is ended


async def test_requests_of_all_kinds_are_noted() -> None:
    engine, soak = FakeEngine(), Soak()
    engine.menu["auto"] = engine.menu["off"]
    engine.refusals = [Overloaded("full", 1.0)]
    async with connect(engine) as client:
        random = Random(0)
        for index in range(60):
            await ask(client, random, index, soak)
    assert soak.statuses.total() + soak.left == 60
    assert soak.statuses.keys() <= {"200", "400", "413", "429"}
    assert soak.statuses["429"] == 1 and soak.statuses["200"] > soak.statuses["400"] > 0
    assert not soak.unended


@pytest.mark.parametrize("wrong", WRONG)
async def test_wrong_requests_are_wrong(wrong: dict[str, object]) -> None:
    async with connect(FakeEngine()) as client:
        body = {"messages": [{"role": "user", "content": "What is red?"}], **wrong}
        reply = await client.post("/v1/chat/completions", content=json.dumps(body))
    assert 400 <= reply.status_code < 500


def test_memory_is_told_by_quarters() -> None:
    sizes = (100, 140, 200, 202)
    soak = Soak(rss=[(quarter * 25 + second, size * 1_000_000) for quarter, size in enumerate(sizes) for second in range(25)])
    document = summarise(soak, 90_000_000, 100)
    assert document["quarters_mb"] == [100, 140, 200, 202]
    assert document["highest_mb"] == [140, 202]
    assert document["growth_of_second_half"] == pytest.approx(0.01)


def test_what_is_left_in_the_engine_is_counted() -> None:
    assert waiting_and_running("# HELP x\nespalier_requests_running 2.0\nespalier_requests_waiting 1.0\n") == 3
