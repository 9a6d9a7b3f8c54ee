"""The app over an engine without a model, and what tests send to it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from server.access import read_keys
from server.app import create_app
from server.served import Served
from server.settings import Settings
from tests.server.fake_engine import FakeEngine, data_url, picture

PICTURE = data_url(picture())
QUESTION = "What color is the star?"
MENU = ["off", "light", "balanced", "strong"]


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    async with connect(engine) as client:
        yield client


def app_of(*engines: Any, **settings: Any) -> FastAPI:
    """The app over engines, as a server with these settings has it."""
    made = Settings(**settings)
    return create_app(Served(engines), made, read_keys(made))


def connect(*engines: Any, **settings: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app_of(*engines, **settings))
    return httpx.AsyncClient(transport=transport, base_url="http://espalier")


def image_part(url: str = PICTURE, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


def body(*images: dict[str, Any], text: str = QUESTION, **fields: Any) -> dict[str, Any]:
    content = [*images, {"type": "text", "text": text}]
    return {"model": "fake-llava", "messages": [{"role": "user", "content": content}], **fields}


async def ask(client: httpx.AsyncClient, payload: Any = None, **more: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body(image_part()) if payload is None else payload, **more)


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """OpenAI's error object, and nothing else."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert isinstance(error["type"], str)
    assert response.headers["x-request-id"]
    return error


def events(text: str) -> list[Any]:
    """The data of a stream, which ends with [DONE]."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]
