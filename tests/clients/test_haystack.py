"""haystack: a chat with a picture, streams, function calls, answers that fit a schema."""

from __future__ import annotations

import pytest

chat = pytest.importorskip("haystack.components.generators.chat")

from haystack.dataclasses import ChatMessage, ImageContent  # noqa: E402
from haystack.tools import Tool  # noqa: E402
from haystack.utils import Secret  # noqa: E402

from tests.clients.ask import ANSWER, MODEL, PICTURE, QUESTION, Star  # noqa: E402

ASKED = [ChatMessage.from_user(content_parts=[ImageContent.from_file_path(PICTURE), QUESTION])]


def test_answers_streams_calls_and_schemas(base_url: str) -> None:
    model = chat.OpenAIChatGenerator(api_key=Secret.from_token("none"), model=MODEL, api_base_url=base_url)
    assert model.run(ASKED)["replies"][0].text == ANSWER
    pieces: list[str] = []
    model.run(ASKED, streaming_callback=lambda piece: pieces.append(piece.content))
    assert "".join(pieces) == ANSWER
    paint = Tool(name="paint", description="Paint it.", parameters=Star.model_json_schema(), function=lambda **star: star)
    (reply,) = model.run(ASKED, tools=[paint], generation_kwargs={"tool_choice": "required"})["replies"]
    (call,) = reply.tool_calls
    assert call.tool_name == "paint" and Star.model_validate(call.arguments)
    (reply,) = model.run(ASKED, generation_kwargs={"response_format": Star})["replies"]
    assert Star.model_validate_json(reply.text)
