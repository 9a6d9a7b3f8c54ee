"""llama-index: a chat with a picture, streams, structured predictions."""

from __future__ import annotations

import pytest

openai_like = pytest.importorskip("llama_index.llms.openai_like")

from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock  # noqa: E402
from llama_index.core.prompts import PromptTemplate  # noqa: E402

from tests.clients.ask import ANSWER, MODEL, PICTURE, QUESTION, Star  # noqa: E402

BLOCKS = [ImageBlock(image=PICTURE.read_bytes(), image_mimetype="image/png"), TextBlock(text=QUESTION)]
ASKED = [ChatMessage(role="user", blocks=BLOCKS)]


def test_answers_streams_and_predictions(base_url: str) -> None:
    about = {"model": MODEL, "api_base": base_url, "api_key": "none", "is_chat_model": True, "context_window": 1024}
    model = openai_like.OpenAILike(**about, is_function_calling_model=True)
    assert model.chat(ASKED).message.content == ANSWER
    assert "".join(piece.delta or "" for piece in model.stream_chat(ASKED)) == ANSWER
    assert isinstance(model.structured_predict(Star, PromptTemplate("Describe {what}."), what="a star"), Star)
    by_schema = openai_like.OpenAILike(**about, should_use_structured_outputs=True)
    assert isinstance(by_schema.structured_predict(Star, PromptTemplate("Describe {what}."), what="a star"), Star)
    assert model.complete("What is red?").text is not None
