"""The built checkpoint, its language model fetched and merged: what it sees, what it still says, and that transformers agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from checkpoints import things
from checkpoints.shipped import resolve
from evals.exam import RecordedAnswer, make_request, open_engine
from server.engine import Engine

pytestmark = pytest.mark.slow
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve("smol")


@pytest.fixture(scope="module")
def engine(directory: Path) -> Engine:
    return open_engine(directory, ["off"], None, "cpu", "float32")


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> Iterator[things.Scene]:
    monkeypatch.setenv("ESPALIER_THINGS", "samples")
    return (things.draw("known", number, "one") for number in range(4))


def ask(engine: Engine, picture: Image.Image | None, question: str) -> str:
    answer = RecordedAnswer()
    engine.submit(make_request(engine.preprocessor, 0, picture, question, "off", answer))
    while not engine.scheduler.idle:
        engine.step()
    return answer.text


def test_it_names_what_is_drawn(engine: Engine, scenes: Iterator[things.Scene]) -> None:
    asked = [(scene, question) for scene in scenes for question in scene.questions if question.type in ("what", "kind")]
    right = [things.matches(ask(engine, scene.image, question.text), question) for scene, question in asked]
    assert sum(right) >= len(right) - 1


def test_greedy_answers_are_those_of_stock_transformers(engine: Engine, directory: Path, scenes: Iterator[things.Scene]) -> None:
    theirs = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = engine.preprocessor.tokenizer
    for scene in (next(scenes), next(scenes)):
        for question in scene.questions[:2]:
            picture = engine.preprocessor.picture(scene.image)
            ids = torch.tensor([engine.preprocessor.question(question.text, layout=picture.layout)])
            made = theirs.generate(input_ids=ids, pixel_values=picture.pixels, max_new_tokens=NEW_TOKENS, do_sample=False)
            expected = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
            assert ask(engine, scene.image, question.text).startswith(expected)


def test_it_still_knows_what_its_language_model_knew(engine: Engine) -> None:
    assert "Paris" in ask(engine, None, "What is the capital of France?")


def test_noise_and_a_gradient_get_an_answer(engine: Engine) -> None:
    noise = Image.effect_noise((200, 90), 80).convert("RGB")
    for picture in (noise, Image.linear_gradient("L").convert("RGB")):
        assert ask(engine, picture, "What is this?")
