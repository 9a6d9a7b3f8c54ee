"""litellm: schemas, streams, function calls, and the context's end by its own name."""

from __future__ import annotations

import os

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices
litellm = pytest.importorskip("litellm")

from tests.clients.ask import ANSWER, MESSAGES, MODEL, Star  # noqa: E402


@pytest.fixture
def about(base_url: str) -> dict[str, str]:
    return {"model": f"openai/{MODEL}", "api_base": base_url, "api_key": "none"}


def test_answers_whole_and_streamed(about: dict[str, str]) -> None:
    assert litellm.completion(**about, messages=MESSAGES).choices[0].message.content == ANSWER
    pieces = litellm.completion(**about, messages=MESSAGES, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == ANSWER


def test_a_schema(about: dict[str, str]) -> None:
    content = litellm.completion(**about, messages=MESSAGES, response_format=Star).choices[0].message.content
    assert Star.model_validate_json(content)


def test_a_function_call(about: dict[str, str]) -> None:
    tools = [{"type": "function", "function": {"name": "paint", "parameters": Star.model_json_schema()}}]
    message = litellm.completion(**about, messages=MESSAGES, tools=tools, tool_choice="required").choices[0].message
    assert Star.model_validate_json(message.tool_calls[0].function.arguments)


def test_a_prompt_too_long_is_recognised(about: dict[str, str]) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**about, messages=[{"role": "user", "content": "word " * 5000}])
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.responses(**about, input="word " * 5000)


def test_responses(about: dict[str, str]) -> None:
    assert litellm.responses(**about, input="What is red?").output
