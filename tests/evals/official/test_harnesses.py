"""What lmms-eval and VLMEvalKit send is answered, at the level in the model's name."""

from __future__ import annotations

import base64
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.server.client import client as client  # fixtures
from tests.server.client import engine as engine

pytestmark = pytest.mark.anyio


def data_url(kind: str) -> str:
    out = BytesIO()
    Image.new("RGB", (40, 30), "red").save(out, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def lmms_eval(model: str) -> dict[str, Any]:
    content = [{"type": "image_url", "image_url": {"url": data_url("PNG")}}, {"type": "text", "text": "Is it red?"}]
    return {"messages": [{"role": "user", "content": content}], "model": model, "max_tokens": 16, "temperature": 0}


def vlmevalkit(model: str) -> dict[str, Any]:
    image = {"type": "image_url", "image_url": {"url": data_url("JPEG"), "detail": "low"}}
    messages = [{"role": "user", "content": [image, {"type": "text", "text": "Is it red?"}]}]
    return {"model": model, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 1024}


@pytest.mark.parametrize("harness", [lmms_eval, vlmevalkit])
@pytest.mark.parametrize("level", ["off", "strong"])
async def test_a_harness_chooses_the_level_by_the_models_name(client: httpx.AsyncClient, harness, level) -> None:
    reply = await client.post("/v1/chat/completions", json=harness(f"fake-llava@{level}"))
    assert reply.status_code == 200, reply.text
    assert reply.json()["pruning"]["level"] == reply.headers["X-Pruning-Level"] == level
    assert reply.json()["choices"][0]["message"]["content"] == "A red star."


async def test_without_a_level_in_the_name_vlmevalkits_detail_is_one(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/chat/completions", json=vlmevalkit("fake-llava"))
    assert reply.json()["pruning"]["level"] == "strong"
