"""Over a socket: the OpenAI client, and those who hang up."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn

from server.errors import Overloaded
from server.request import Failed
from tests.server.client import QUESTION, app_of, body, image_part
from tests.server.client import client as client  # fixtures
from tests.server.client import engine as engine
from tests.server.fake_engine import FakeEngine, picture

pytestmark = pytest.mark.anyio


# ---- over a socket


@pytest.fixture
def address(engine: FakeEngine) -> Iterator[tuple[str, int]]:
    """A real server for the engine."""
    server = uvicorn.Server(uvicorn.Config(app_of(engine), log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        engine.release.set()
        thread.join()


@pytest.fixture
def sdk(address: tuple[str, int]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{address[0]}:{address[1]}/v1", api_key="none", max_retries=1) as client:
        yield client


def said(sdk: openai.OpenAI, **more: Any) -> Any:
    payload = body(image_part())
    return sdk.chat.completions.create(**(payload | more))


def test_openais_client_chooses_a_level_in_three_ways(sdk: openai.OpenAI) -> None:
    ways = [{"extra_headers": {"X-Pruning-Level": "strong"}}, {"extra_body": {"pruning": {"level": "strong"}}}]
    for way in [*ways, {"model": "fake-llava@strong"}]:
        reply = said(sdk, **way)
        assert reply.choices[0].message.content == "A red star."
        assert reply.pruning["level"] == "strong"
        assert reply.usage.image_tokens_kept == 2
    raw = sdk.chat.completions.with_raw_response.create(**body(image_part(detail="low")))
    assert raw.headers["x-pruning-level"] == "strong"
    assert "fake-llava@strong" in [model.id for model in sdk.models.list()]
    assert sdk.models.retrieve("fake-llava@strong").id == "fake-llava@strong"


def test_openais_client_reads_the_stream(sdk: openai.OpenAI) -> None:
    chunks = list(said(sdk, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "A red star."
    assert chunks[-2].pruning["level"] == "off"
    assert chunks[-1].usage.completion_tokens == 4


def test_openais_client_reads_logprobs(sdk: openai.OpenAI) -> None:
    content = said(sdk, logprobs=True, top_logprobs=1).choices[0].logprobs.content
    assert content[0].top_logprobs[0].token == "A"


def test_openais_client_knows_the_errors(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        said(sdk, extra_body={"pruning": {"level": "x"}})
    assert (refusal.value.code, refusal.value.param) == ("unknown_pruning_level", "pruning.level")
    with pytest.raises(openai.NotFoundError):
        said(sdk, model="gpt-4o")
    engine.failure, engine.fail_after = Failed("This request failed."), 3
    with pytest.raises(openai.APIError, match="This request failed"):
        list(said(sdk, stream=True))


def test_openais_client_comes_back_after_an_overload(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.refusals = [Overloaded("The queue is full.", 0.01)]
    assert said(sdk).choices[0].message.content == "A red star."
    assert not engine.refusals
    engine.refusals = [Overloaded("The queue is full.", 0.01)] * 2
    with pytest.raises(openai.RateLimitError):
        said(sdk)


@pytest.mark.parametrize(("stream", "hold_after"), [(False, 0), (False, 2), (True, 0), (True, 2)])
def test_hanging_up_frees_every_choice(
    address: tuple[str, int], engine: FakeEngine, stream: bool, hold_after: int
) -> None:
    engine.hold_after = hold_after
    payload = json.dumps(body(image_part(), stream=stream, n=2)).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n".encode()
    with socket.create_connection(address) as line:
        line.sendall(head + payload)
        assert engine.has_submitted.wait(30)
        if stream and hold_after:
            assert line.recv(100).startswith(b"HTTP/1.1 200")
    assert engine.all_aborted.wait(30)
    assert engine.aborted == [request.id for request in engine.submitted]


def test_hanging_up_in_the_middle_of_a_body_is_no_error(
    address: tuple[str, int], engine: FakeEngine, sdk: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection(address) as line:
        line.sendall(b"POST /v1/vqa HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    assert said(sdk).choices
    assert not engine.aborted
    assert not caplog.records


def test_an_oversized_upload_is_answered_before_it_is_sent(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as line:
        line.sendall(b"POST /v1/vqa HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 413")


def test_a_form_over_a_socket(address: tuple[str, int]) -> None:
    url = f"http://{address[0]}:{address[1]}/v1/vqa"
    reply = httpx.post(url, files={"image": ("p.png", picture())}, data={"question": QUESTION}).json()
    assert reply["answer"] == "A red star."
