"""OpenAI's Python client: parsed answers, responses, function calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.clients.ask import ANSWER, MESSAGES, MODEL, QUESTION, URL, Star

TOOLS: list[Any] = [openai.pydantic_function_tool(Star)]
INPUT: list[Any] = [
    {"role": "user", "content": [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": QUESTION}]}
]


@pytest.fixture
def client(base_url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=base_url, api_key="none") as client:
        yield client


def test_chat_answers_are_parsed(client: openai.OpenAI) -> None:
    reply = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Star, n=2, temperature=1)
    assert all(isinstance(choice.message.parsed, Star) for choice in reply.choices)
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, response_format=Star) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Star)


def test_responses_are_parsed(client: openai.OpenAI) -> None:
    assert isinstance(client.responses.parse(model=MODEL, input=INPUT, text_format=Star).output_parsed, Star)
    assert client.responses.create(model=f"{MODEL}@light", input=INPUT).output_text == ANSWER
    with client.responses.stream(model=MODEL, input=INPUT, text_format=Star) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Star)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Star"}}])
def test_functions_are_called_and_answered(client: openai.OpenAI, choice: Any) -> None:
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=choice) as stream:
        message = stream.get_final_completion().choices[0].message
    (call,) = message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Star)
    history = [*MESSAGES, message.model_dump(exclude_none=True), {"role": "tool", "tool_call_id": call.id, "content": "done"}]
    for turn in history:
        for one in turn.get("tool_calls", ()):
            one["function"].pop("parsed_arguments", None)
    assert client.chat.completions.create(model=MODEL, messages=history, tools=TOOLS, tool_choice="none").choices[0].message.content


def test_choices_are_kept(client: openai.OpenAI) -> None:
    for form in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
        reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, extra_body=form)
        assert reply.choices[0].message.content in ("yes", "no")


def test_json_mode(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=300)
    content = reply.choices[0].message.content or ""
    assert content.startswith("{") and (reply.choices[0].finish_reason == "length" or json.loads(content) is not None)
