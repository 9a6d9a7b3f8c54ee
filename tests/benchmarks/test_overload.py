"""The overload benchmark's own judgement: what OpenAI's client came through with, and how late."""

from __future__ import annotations

from random import Random

import openai
import pytest

from benchmarks.overload import Outcome, arrive, overload, question, saturate, summarise
from server.errors import Overloaded
from tests.benchmarks.test_http import serving
from tests.server.client import app_of
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio


async def test_a_refusal_that_is_tried_again_is_an_answer() -> None:
    engine = FakeEngine()
    engine.refusals = [Overloaded("full", 0.05), *[Overloaded("full", 0.01)] * 3]
    with serving(app_of(engine)) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            (first,) = await overload(client, [question("fake-llava", 1)], [0.0])
            assert (first.error, first.level) == ("429", ""), "three attempts are all"
            (second,) = await overload(client, [question("fake-llava", 2)], [0.1])
            assert await saturate(client, "fake-llava", 0.5) > 1
    assert (second.error, second.retries, second.level) == ("", 1, "off")
    assert second.asked >= 0.1 and second.ended - second.asked > second.last > 0


def test_questions_come_at_random_and_as_often_as_asked() -> None:
    moments = list(arrive(50, 100, Random(0)))
    assert len(moments) == pytest.approx(5000, rel=0.05)
    assert moments == sorted(moments) and moments[-1] < 100
    assert moments == list(arrive(50, 100, Random(0)))


def test_what_came_late_is_told_apart() -> None:
    outcomes = [Outcome(0.0, 1.0, 0, 1.0, "off"), Outcome(1.0, 7.0, 2, 1.5, "strong"), Outcome(0.0, 2.0, error="429")]
    document = summarise(outcomes, 5.0)
    assert (document["asked"], document["answered"], document["in_time"], document["answered_per_s"]) == (3, 2, 1, 0.2)
    assert (document["e2e_s"]["p99"], document["last_attempt_s"]["p99"]) == (6.0, 1.5)
    assert document["levels"] == {"off": 1, "strong": 1} and document["errors"] == {"429": 1}


def test_nothing_answered_is_told_too() -> None:
    assert summarise([Outcome(0.0, 2.0, error="429")], 5.0)["share_answered"] == 0
