"""OpenAI's responses: items in, items or events out, through OpenAI's own client where it matters."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from server.request import Failed
from tests.server.client import PICTURE, QUESTION, check_error, connect
from tests.server.client import client as client  # fixtures
from tests.server.client import engine as engine
from tests.server.fake_engine import VISUAL_TOKENS, FakeEngine
from tests.server.test_socket import address as address
from tests.server.test_socket import sdk as sdk

pytestmark = pytest.mark.anyio



def item(role: str, *parts: dict[str, Any]) -> list[Any]:
    return [{"role": role, "content": [*parts]}]


ASK = item("user", {"type": "input_image", "image_url": PICTURE, "detail": "low"}, {"type": "input_text", "text": QUESTION})
WEATHER = {"type": "function", "name": "weather", "description": "Tell it.", "parameters": {"type": "object", "properties": {}}}
CALL = ('{"name": "weather', '", "arguments": ', '{"city": "Bern"}', "}")


async def ask(client: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await client.post("/v1/responses", json={"model": "fake-llava", "input": ASK, **fields})


def test_openais_client_reads_a_response(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    about: Any = {"instructions": "Be brief.", "store": False, "metadata": {"a": "b"}, "top_logprobs": 1}
    reply = sdk.responses.create(model="fake-llava", input=ASK, **about)
    assert (reply.output_text, reply.status, reply.object, reply.store) == ("A red star.", "completed", "response", False)
    assert (reply.instructions, reply.metadata, reply.error) == ("Be brief.", {"a": "b"}, None)
    assert reply.id.startswith("resp_")
    assert reply.usage and (reply.usage.input_tokens, reply.usage.output_tokens) == (VISUAL_TOKENS + 5 + 2, 4)
    assert reply.pruning["level"] == "strong" and reply.pruning["reason"] == "detail"  # type: ignore[attr-defined]
    (message,) = reply.output
    assert message.type == "message" and message.content[0].type == "output_text" and message.content[0].logprobs
    assert [entry.token for entry in message.content[0].logprobs] == ["A", " red", " star", "."]
    assert [turn["role"] for turn in engine.preprocessor.turns] == ["system", "user"]


def test_openais_client_follows_the_events(sdk: openai.OpenAI) -> None:
    with sdk.responses.stream(model="fake-llava", input="What is red?") as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * 4, "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert final.output_text == "A red star." and final.usage and final.usage.output_tokens == 4
    assert final.pruning["level"] == "off"  # type: ignore[attr-defined]


async def test_the_stream_ends_in_the_whole_response(client: httpx.AsyncClient) -> None:
    whole = (await ask(client)).json()
    text = (await ask(client, stream=True)).text
    lines = [line for line in text.split("\n") if line.startswith("data: ")]
    last = json.loads(lines[-1].removeprefix("data: "))["response"]
    for one in (whole, last):
        assert one.pop("id").startswith("resp_") and one["output"][0].pop("id").startswith("msg_") and one.pop("created_at")
    assert last == whole


async def test_a_response_cut_short_says_so(client: httpx.AsyncClient) -> None:
    reply = (await ask(client, max_output_tokens=2)).json()
    assert (reply["status"], reply["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert "event: response.incomplete\n" in (await ask(client, max_output_tokens=2, stream=True)).text


def test_a_function_call_is_an_item(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.words = CALL
    tools: Any = [WEATHER]
    reply = sdk.responses.create(model="fake-llava", input="Weather?", tools=tools)
    (call,) = reply.output
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments), call.status) == ("weather", {"city": "Bern"}, "completed")
    with sdk.responses.stream(model="fake-llava", input="Weather?", tools=tools) as stream:
        kinds = {event.type for event in stream}
        (streamed,) = stream.get_final_response().output
    assert {"response.function_call_arguments.delta", "response.function_call_arguments.done"} <= kinds
    assert streamed.type == "function_call" and streamed.arguments == call.arguments
    history: Any = [*ASK, call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert sdk.responses.create(model="fake-llava", input=history, tools=tools, tool_choice="none").output_text
    assert [turn["role"] for turn in engine.preprocessor.turns] == ["user", "assistant", "user"]
    assert engine.preprocessor.turns[1]["content"][0]["text"] == '{"name": "weather", "arguments": {"city": "Bern"}}'
    assert engine.preprocessor.turns[2]["content"] == [{"type": "text", "text": "sunny"}]


@pytest.mark.parametrize(("words", "kind"), [(CALL, "function_call"), (("{", "red}"), "message")])
def test_a_stream_of_log_probabilities_has_one_item(sdk: openai.OpenAI, engine: FakeEngine, words: Any, kind: str) -> None:
    """Also while its first tokens may be a call's or a text's."""
    engine.words = words
    fields: Any = {"model": "fake-llava", "input": "Weather?", "tools": [WEATHER], "top_logprobs": 1}
    with sdk.responses.stream(**fields) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_response().output
    (whole,) = sdk.responses.create(**fields).output
    added = [event.item.type for event in events if event.type == "response.output_item.added"]
    assert added == [kind] and streamed.type == whole.type == kind
    if whole.type == streamed.type == "message":
        (part,), (same,) = whole.content, streamed.content
        assert part.type == same.type == "output_text" and (same.text, same.logprobs) == (part.text, part.logprobs)
        told = [entry.token for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
        assert told == [*words]


def test_openais_client_learns_of_a_failure(sdk: openai.OpenAI, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = Failed("This request failed."), 3
    events = list(sdk.responses.create(model="fake-llava", input="Hi?", stream=True))
    assert events[-1].type == "response.failed" and events[-1].response.error
    assert events[-1].response.error.message == "This request failed."


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": " "}, "input"),
        ({"input": "word " * 3000}, "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": item("user", {"type": "input_image", "file_id": "x"})}, "input[0].content[0].image_url"),
        ({"input": item("user", {"type": "input_image", "image_url": "http://x/y.png"})}, "input[0].content[0].image_url"),
        (
            {"input": [*item("user", {"type": "input_text", "text": "x"}), {"type": "function_call_output", "call_id": "c",
             "output": [{"type": "input_image", "image_url": PICTURE}]}]}, "input[1].output[0]",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages"),
        ({"input": item("assistant", {"type": "input_image", "image_url": PICTURE})}, "input[0].content[0]"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "foo"}}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
        ({"pruning": {"level": "x"}}, "pruning.level"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named(client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], param: str) -> None:
    error = check_error(await ask(client, **fields), 400)
    assert error["param"] == param, error
    assert not engine.submitted


async def test_a_reply_in_json_is_openais(client: httpx.AsyncClient) -> None:
    form = {"type": "json_schema", "name": "colour", "description": "Of a star.", "schema": {"type": "object"}}
    reply = (await ask(client, input="Hi?", text={"format": form})).json()
    told = Response.model_validate(reply).text
    assert told and told.format and told.format.type == "json_schema" and told.format.name == "colour"


async def test_its_own_name_of_the_length_limit_wins(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    reply = (await ask(client, input="Hi?", max_output_tokens=3, max_tokens=9)).json()
    assert reply["max_output_tokens"] == engine.submitted[0].sampling.max_tokens == 3


async def test_whether_calls_may_be_parallel_comes_back(client: httpx.AsyncClient) -> None:
    """Also in the stream; by default they may."""
    for fields, expected in (({}, True), ({"parallel_tool_calls": False}, False)):
        assert (await ask(client, **fields)).json()["parallel_tool_calls"] is expected
    assert '"parallel_tool_calls":false' in (await ask(client, parallel_tool_calls=False, stream=True)).text


async def test_harmless_fields_pass(client: httpx.AsyncClient) -> None:
    fields = {
        "store": True, "truncation": "disabled", "reasoning": {"effort": None}, "include": ["reasoning.encrypted_content"],
        "parallel_tool_calls": True, "previous_response_id": None, "text": {"format": {"type": "text"}, "verbosity": None},
        "user": "me", "service_tier": "auto", "tools": [], "stream_options": {"include_obfuscation": False},
    }  # fmt: skip
    assert (await ask(client, **fields)).json()["store"] is False


async def test_a_picture_too_many_is_named(engine: FakeEngine) -> None:
    async with connect(engine, max_images=1) as client:
        part = {"type": "input_image", "image_url": PICTURE}
        error = check_error(await ask(client, input=[{"role": "user", "content": [part, part]}]), 413)
        assert error["param"] == "input[0].content[1].image_url"
