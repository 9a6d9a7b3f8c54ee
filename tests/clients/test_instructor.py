"""instructor: models as answers, by function calls and by schemas."""

from __future__ import annotations

import openai
import pytest

instructor = pytest.importorskip("instructor")

from tests.clients.ask import MESSAGES, MODEL, Star  # noqa: E402


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_an_answer_is_a_model(base_url: str, mode: str) -> None:
    client = instructor.from_openai(openai.OpenAI(base_url=base_url, api_key="none"), mode=instructor.Mode[mode])
    assert isinstance(client.create(model=MODEL, response_model=Star, messages=MESSAGES, max_retries=0), Star)
