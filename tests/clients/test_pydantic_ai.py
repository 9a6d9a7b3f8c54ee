"""pydantic-ai: output types by functions and by schemas, over chat completions and responses."""

from __future__ import annotations

import pytest

ai = pytest.importorskip("pydantic_ai")

from pydantic_ai import Agent, BinaryContent, NativeOutput  # noqa: E402
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel  # noqa: E402
from pydantic_ai.providers.openai import OpenAIProvider  # noqa: E402

from tests.clients.ask import ANSWER, MODEL, PICTURE, QUESTION, Star  # noqa: E402

ASKED = [QUESTION, BinaryContent(PICTURE.read_bytes(), media_type="image/png")]


@pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])
def test_output_types(base_url: str, kind: type) -> None:
    model = kind(MODEL, provider=OpenAIProvider(base_url=base_url, api_key="none"))
    assert Agent(model).run_sync(ASKED).output == ANSWER
    for output in (Star, NativeOutput(Star)):
        assert isinstance(Agent(model, output_type=output).run_sync(ASKED).output, Star)
