"""The cost of a chat by level, foretold and then run."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from io import BytesIO
from typing import Any

import httpx
import pytest

from checkpoints.world import draw
from models.checkpoint import load
from server.engine import Engine
from tests.pruning.dynamic.tiny_router import POINTS, plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.server.client import app_of, body, check_error, image_part
from tests.server.fake_engine import data_url
from tests.server.tiny import LEVELS, VISUAL, new_engine
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint

pytestmark = pytest.mark.anyio


@pytest.fixture(name="running")
def started_engine(tiny: Any) -> Iterator[Engine]:
    engine = new_engine(tiny)
    engine.start()
    yield engine
    engine.stop()


def connect(engine: Engine) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app_of(engine)), base_url="http://espalier")


@pytest.fixture
async def client(running: Engine) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(running) as client:
        yield client


def chat(pictures: int = 1, **fields: Any) -> dict[str, Any]:
    file = BytesIO()
    draw("validation", 0).image.save(file, "PNG")
    return {**body(*[image_part(data_url(file.getvalue()))] * pictures, **fields), "model": None, "max_tokens": 4}


async def test_what_is_foretold_is_what_runs(client: httpx.AsyncClient) -> None:
    before = (await client.post("/v1/pruning/estimate", json=chat(2))).json()
    assert [one["level"] for one in before["data"]] == [*LEVELS]
    assert {one["seconds"] for one in before["data"]} == {None}, "nothing has been run yet"
    assert before["image_tokens"] == 2 * VISUAL and before["max_tokens"] == 4
    for one in before["data"]:
        reply = (await client.post("/v1/chat/completions", json=chat(2, pruning={"level": one["level"]}))).json()
        receipt = reply["pruning"]
        assert (one["visual_tokens"], one["layers"]) == (receipt["visual_tokens"], receipt["layers"])
        assert one["flops_ratio"] == pytest.approx(receipt["flops_ratio"], abs=1e-4)
        assert before["prompt_tokens"] == reply["usage"]["prompt_tokens"]
    after = (await client.post("/v1/pruning/estimate", json=chat(2))).json()
    seconds = {one["level"]: one["seconds"] for one in after["data"]}
    assert 0 < seconds["strong"] < seconds["off"] < 60


async def test_each_choice_costs_as_much_again(client: httpx.AsyncClient) -> None:
    async def foretold(n: int) -> float:
        data = (await client.post("/v1/pruning/estimate", json=chat(2, n=n))).json()["data"]
        return next(one["seconds"] for one in data if one["level"] == "off")

    await client.post("/v1/chat/completions", json=chat(2))
    once, twice = 0.0, 0.0
    while once != (once := await foretold(1)):  # the last pass counts a moment after its answer
        twice = await foretold(2)
    assert once < twice < 2.1 * once


async def test_a_level_that_never_fits_says_so(tiny: Any) -> None:
    async with connect(new_engine(tiny, kv_rows=300)) as client:
        data = (await client.post("/v1/pruning/estimate", json=chat())).json()["data"]
        refused = {one["level"]: "refused" in one for one in data}
        assert refused["off"] and not refused["thin"]
        check_error(await client.post("/v1/pruning/estimate", json={"messages": []}), 400)


async def test_a_routed_level_tells_its_most(routed: Any) -> None:
    async with connect(new_engine(load(routed))) as client:
        data = {one["level"]: one for one in (await client.post("/v1/pruning/estimate", json=chat())).json()["data"]}
    assert data["balanced"]["at_most"]["flops_ratio"] >= data["balanced"]["flops_ratio"]
    assert "at_most" not in data["off"]


async def test_an_unknown_level_is_refused_as_the_chat_would(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/pruning/estimate", json=chat() | {"pruning": {"level": "nonsense"}})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "unknown_pruning_level"
