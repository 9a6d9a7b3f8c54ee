"""langchain: structured output by its two methods, bound functions, streams."""

from __future__ import annotations

import pytest

openai = pytest.importorskip("langchain_openai")

from tests.clients.ask import ANSWER, MESSAGES, MODEL, Star  # noqa: E402


def test_structured_output_and_functions(base_url: str) -> None:
    model = openai.ChatOpenAI(base_url=base_url, api_key="none", model=MODEL)
    assert model.invoke(MESSAGES).content == ANSWER
    assert "".join(piece.content for piece in model.stream(MESSAGES)) == ANSWER
    for method in ("json_schema", "function_calling"):
        assert isinstance(model.with_structured_output(Star, method=method).invoke(MESSAGES), Star)
    (call,) = model.bind_tools([Star], tool_choice="required").invoke(MESSAGES).tool_calls
    assert call["name"] == "Star" and Star.model_validate(call["args"])
