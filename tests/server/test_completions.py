"""Completions, tokens and their texts, and paths as clients write them."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.client import PICTURE, QUESTION, ask, body, check_error, events, image_part
from tests.server.client import client as client  # fixtures
from tests.server.client import engine as engine
from tests.server.fake_engine import VISUAL_TOKENS, FakeEngine
from tests.server.test_socket import address as address
from tests.server.test_socket import sdk as sdk

pytestmark = pytest.mark.anyio


async def complete(client: httpx.AsyncClient, prompt: Any = "The star is", **fields: Any) -> httpx.Response:
    return await client.post("/v1/completions", json={"model": "fake-llava", "prompt": prompt, **fields})


def test_openais_client_completes_a_text(sdk: openai.OpenAI) -> None:
    reply = sdk.completions.create(model="fake-llava@light", prompt="The star is", n=2, stop="!", logprobs=1)
    assert (reply.object, [choice.text for choice in reply.choices]) == ("text_completion", ["A red star."] * 2)
    assert reply.id.startswith("cmpl-") and reply.usage and reply.usage.prompt_tokens == 4
    first = reply.choices[0]
    assert first.finish_reason == "stop" and first.logprobs
    assert (first.logprobs.tokens, first.logprobs.text_offset) == (["A", " red", " star", "."], [0, 1, 5, 10])
    assert first.logprobs.top_logprobs and first.logprobs.top_logprobs[1] == {" red": -0.25}


def test_openais_client_streams_a_text(sdk: openai.OpenAI) -> None:
    usage: Any = {"include_usage": True}
    chunks = list(sdk.completions.create(model="fake-llava", prompt="Hi", stream=True, logprobs=0, stream_options=usage))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "A red star."
    offsets = [at for chunk in chunks for choice in chunk.choices if choice.logprobs for at in choice.logprobs.text_offset or []]
    assert offsets == [0, 1, 5, 10]
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage and chunks[-1].usage.completion_tokens == 4
    assert {chunk.object for chunk in chunks} == {"text_completion"}


async def test_a_prompt_may_be_tokens(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await complete(client, [5, 6, 7])).status_code == 200
    assert (await complete(client, [[5, 6]])).status_code == 200
    assert (await complete(client, ["one text"])).status_code == 200
    assert [request.prompt for request in engine.submitted] == [[5, 6, 7], [5, 6], [0, 1, 2]]
    assert all(request.continues for request in engine.submitted), "so that leading blanks stay"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [1000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": "word " * 3000}, "prompt"),
        ({"prompt": ["one", "two"]}, "prompt"),
        ({"prompt": "what is <image> ?"}, "prompt"),
        ({"prompt": "a" * 200_000}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"pruning": {"level": "x"}}, "pruning.level"),
    ],
)
async def test_completions_name_what_is_wrong(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    assert check_error(await complete(client, **fields), 400)["param"] == param
    assert not engine.submitted


async def test_no_chunk_of_a_text_is_empty_of_choices(client: httpx.AsyncClient) -> None:
    assert [len(event["choices"]) for event in events((await complete(client, stream=True)).text)] == [1] * 5


async def test_tokens_and_their_text(client: httpx.AsyncClient) -> None:
    reply = (await client.post("/tokenize", json={"prompt": "a b", "return_token_strs": True})).json()
    assert reply == {"count": 3, "max_model_len": 2000, "tokens": [0, 1, 2], "token_strs": ["w0", "w1", "w2"]}
    plain = (await client.post("/tokenize", json={"prompt": "a b", "add_special_tokens": False})).json()
    assert plain["tokens"] == [1, 2]
    chat = (await client.post("/tokenize", json=body(image_part()))).json()
    assert chat["count"] == VISUAL_TOKENS + len(QUESTION.split())
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    asked = (await ask(client, body(image_part(), **tools))).json()
    assert (await client.post("/tokenize", json=body(image_part(), **tools))).json()["count"] == asked["usage"]["prompt_tokens"]
    for fields, param in ((body(chat_template="x"), "chat_template"), ({"prompt": "a", **tools}, None)):
        assert check_error(await client.post("/tokenize", json=fields), 400)["param"] == param
    assert (await client.post("/detokenize", json={"tokens": [1, 2]})).json() == {"prompt": "w1 w2"}
    for path, wrong in (("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": []}), ("/detokenize", {"tokens": [1000]})):
        check_error(await client.post(path, json=wrong), 400)
    check_error(await client.post("/tokenize", json={"prompt": "a", "model": "gpt-4o"}), 404)


async def test_an_image_may_be_its_url_alone_and_original(client: httpx.AsyncClient) -> None:
    assert (await ask(client, body({"type": "image_url", "image_url": PICTURE}))).status_code == 200
    reply = (await ask(client, body(image_part(detail="original")))).json()
    assert (reply["pruning"]["level"], reply["pruning"]["reason"]) == ("off", "detail")


# ---- paths


async def test_an_unknown_path_is_told_what_exists(client: httpx.AsyncClient) -> None:
    message = check_error(await client.post("/v1/embeddings", json={}), 404)["message"]
    assert "/v1/embeddings" in message and "POST /v1/chat/completions" in message and "GET /v1/models" in message


@pytest.mark.parametrize("path", ["/v1/models", "/live", "/metrics", "/version", "/v1/pruning/levels", "/docs"])
async def test_head_is_get_without_its_body(client: httpx.AsyncClient, path: str) -> None:
    response = await client.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == (await client.get(path)).headers["content-type"]


async def test_head_where_nothing_is_got(client: httpx.AsyncClient) -> None:
    assert (await client.head("/v1/chat/completions")).status_code == 405
    assert (await client.head("/nothing")).status_code == 404


@pytest.mark.parametrize("path", ["/v1/chat/completions/", "/v1//chat//completions", "/v1//chat/completions//"])
async def test_slashes_that_double_or_trail_mean_nothing(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.post(path, json=body(image_part()))).status_code == 200
    assert (await client.get("/v1/models/")).status_code == 200
