"""dspy: a signature about a picture, answered by its adapters."""

from __future__ import annotations

import os
from typing import Literal

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices
dspy = pytest.importorskip("dspy")
litellm = pytest.importorskip("litellm")

from tests.clients.ask import MODEL, PICTURE, QUESTION, Star  # noqa: E402


class Ask(dspy.Signature):
    """Answer the question about the picture."""

    picture: dspy.Image = dspy.InputField()
    question: str = dspy.InputField()
    color: Literal["red", "green", "blue", "white"] = dspy.OutputField()


def test_a_signature_is_answered(base_url: str) -> None:
    # dspy sends schemas to models of which litellm knows that they take them.
    litellm.register_model({f"openai/{MODEL}": {"litellm_provider": "openai", "mode": "chat", "supports_response_schema": True}})
    model = dspy.LM(f"openai/{MODEL}", api_base=base_url, api_key="none", engine="litellm", cache=False, max_tokens=256)
    with dspy.context(lm=model, adapter=dspy.JSONAdapter()):
        answer = dspy.Predict(Ask)(picture=dspy.Image.from_path(str(PICTURE)), question=QUESTION)
        assert answer.color in Star.model_fields["color"].annotation.__args__
