"""Reading is bounded, texts pass pictures, and nobody is read for who has left; bodies share a budget and have a deadline."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from server.budget import BytesBudget
from server.envelope import UNPACKED
from server.errors import Overloaded
from server.reading import NICENESS, READERS, ClientLeft, Reading, check_wanted
from tests.server.client import ask, body, check_error, connect, image_part
from tests.server.client import engine as engine  # fixtures
from tests.server.fake_engine import FakeEngine

pytestmark = pytest.mark.anyio
TEXT = {"messages": [{"role": "user", "content": "What is red?"}]}


async def until(condition: Any) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def test_a_text_passes_pictures_that_are_read(engine: FakeEngine) -> None:
    engine.preprocessor.may_finish.clear()
    async with connect(engine, max_batch=1, max_queue=1) as client:
        reading = [asyncio.create_task(ask(client)) for _ in range(READERS)]
        await until(lambda: len(engine.preprocessor.seen) == READERS)
        waiting = [asyncio.create_task(ask(client)) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert (await ask(client, TEXT)).status_code == 200
        check_error(await ask(client), 429)
        engine.preprocessor.may_finish.set()
        assert [(await task).status_code for task in (*reading, *waiting)] == [200] * (READERS + 2)


async def test_who_leaves_is_not_read_for(engine: FakeEngine) -> None:
    reading, begun, go_on, ended = Reading(10), threading.Event(), threading.Event(), []

    def read() -> None:
        begun.set()
        go_on.wait(30)
        try:
            check_wanted()
        except ClientLeft as left:
            ended.append(left)

    task = asyncio.create_task(reading.run(read, pictures=True))
    await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    await until(lambda: ended)
    check_wanted()  # nobody has left who is not read for


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
async def test_who_reads_pictures_steps_back() -> None:
    reading, own = Reading(1), os.getpriority(os.PRIO_PROCESS, 0)
    found = [await reading.run(lambda: os.getpriority(os.PRIO_PROCESS, 0), pictures=pictures) for pictures in (True, False)]
    assert found == [min(19, own + NICENESS), own]


async def test_readers_queue_is_bounded() -> None:
    reading, go_on = Reading(1), threading.Event()
    tasks = [asyncio.create_task(reading.run(lambda: go_on.wait(30), pictures=False)) for _ in range(READERS + 1)]
    await asyncio.sleep(0.05)
    with pytest.raises(Overloaded):
        await reading.run(lambda: None, pictures=False)
    go_on.set()
    await asyncio.gather(*tasks)


async def test_bodies_in_flight_share_a_budget(engine: FakeEngine) -> None:
    content = json.dumps(body(image_part())).encode()
    go_on = asyncio.Event()

    async def held() -> AsyncIterator[bytes]:
        yield content[:-1]
        await go_on.wait()
        yield content[-1:]

    async with connect(engine, max_bodies_bytes=2 * len(content) - 10) as client:
        first = asyncio.create_task(client.post("/v1/chat/completions", content=held()))
        await asyncio.sleep(0.05)
        refused = await client.post("/v1/chat/completions", content=content)
        assert check_error(refused, 429)["code"] == "overloaded" and refused.headers["retry-after"] == "1"
        go_on.set()
        assert (await first).status_code == 200
        for _ in range(3):
            assert (await client.post("/v1/chat/completions", content=content)).status_code == 200


async def test_packed_bodies_share_it_as_they_unpack(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty bombs at once: of each a piece at most is unpacked before it is counted."""
    bomb, budget, pieces = gzip.compress(b" " * 30_000_000), 4 * UNPACKED, [0]

    def counted(self: BytesBudget, size: int) -> None:
        pieces.append(size)
        add(self, size)

    add = BytesBudget.add
    monkeypatch.setattr(BytesBudget, "add", counted)
    async with connect(engine, max_bodies_bytes=budget) as client:
        headers = {"Content-Encoding": "gzip"}
        posts = [client.post("/v1/chat/completions", content=bomb, headers=headers) for _ in range(40)]
        assert {reply.status_code for reply in await asyncio.gather(*posts)} == {429}
        assert max(pieces) <= UNPACKED
        assert (await ask(client)).status_code == 200


async def test_unfinished_bodies_never_hold_more(engine: FakeEngine) -> None:
    """Forty that stop half-way: those that fit wait, the others are refused, and all is free when they have gone."""
    go_on = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b" " * 10_000
        await go_on.wait()

    async with connect(engine, max_bodies_bytes=500_000) as client:
        posts = [asyncio.create_task(client.post("/v1/chat/completions", content=half())) for _ in range(40)]
        await until(lambda: sum(task.done() for task in posts) >= 35)
        refused = [task.result().status_code for task in posts if task.done()]
        assert set(refused) == {429} and len(refused) < 40
        go_on.set()
        await asyncio.gather(*posts)
        assert (await ask(client)).status_code == 200


def test_fetched_bytes_share_it_too() -> None:
    budget = BytesBudget(100)
    with budget.share() as first, budget.share() as second:
        first.take(60)
        with pytest.raises(Overloaded):
            second.take(60)
    with budget.share() as third:
        third.take(100)
    with pytest.raises(ClientLeft):
        third.take(1)


async def test_a_body_has_a_deadline(engine: FakeEngine) -> None:
    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    async with connect(engine, body_timeout_s=1) as client:
        response: httpx.Response = await client.post("/v1/chat/completions", content=never())
        assert check_error(response, 408)["code"] == "request_timeout"
        engine.hold_after = 1
        answered = asyncio.create_task(ask(client, TEXT))
        await asyncio.sleep(1.2)  # an answer may take longer than a body
        engine.release.set()
        assert (await answered).status_code == 200
