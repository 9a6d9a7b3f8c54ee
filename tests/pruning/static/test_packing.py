"""Packed samples: questions side by side are each what they would be alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from checkpoints import world
from models.checkpoint import TransformersCheckpoint, open_transformers
from pruning.samples import of_scene, read
from pruning.static.packing import PackedSample, pack
from tests.server.tiny import write

SCENE = world.draw("train", 3)


@pytest.fixture(scope="module", name="source")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> TransformersCheckpoint:
    return open_transformers(write(tmp_path_factory.mktemp("tiny") / "tiny"), dtype="float32")


@torch.no_grad()
def answer_logits(source: TransformersCheckpoint, sample: PackedSample) -> torch.Tensor:
    return source.model(**sample.inputs(source.model), use_cache=False).logits[0, sample.before_answers]


def test_questions_side_by_side_are_answered_as_each_alone(source: TransformersCheckpoint) -> None:
    together = pack(source.preprocessor, of_scene(SCENE))
    logits, segments = answer_logits(source, together), together.segments[together.answers]
    for segment, question in enumerate(SCENE.questions, 1):
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = source.preprocessor.prompt([{"role": "user", "content": content}])
        alone = source.model(input_ids=torch.tensor([prompt]), pixel_values=together.picture.pixels, use_cache=False).logits[0, -1]
        assert_close(logits[segments == segment][0], alone, rtol=1e-4, atol=1e-5)


def test_the_answers_are_told_apart_and_end(source: TransformersCheckpoint) -> None:
    sample = pack(source.preprocessor, of_scene(SCENE))
    tokenizer = source.preprocessor.tokenizer
    for segment, question in enumerate(SCENE.questions, 1):
        said = sample.ids[sample.answers & (sample.segments == segment)]
        assert tokenizer.decode(said) == f" {question.answer}{tokenizer.eos_token}"


def test_every_turn_of_a_conversation_is_a_question_of_its_own(source: TransformersCheckpoint, tmp_path: Path) -> None:
    SCENE.image.save(tmp_path / "a.png")
    line = (
        '{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "one"},'
        ' {"from": "human", "value": "And that?"}, {"from": "gpt", "value": "two"}]}'
    )
    (tmp_path / "data.jsonl").write_text(line)
    (sample,) = (pack(source.preprocessor, one) for one in read(str(tmp_path / "data.jsonl"), 1, seed=0))
    decoded = [source.preprocessor.tokenizer.decode(sample.ids[sample.segments == segment]) for segment in (1, 2)]
    assert [text.split("ASSISTANT:")[0].strip() for text in decoded] == ["What is it?", "And that?"]
    assert int(sample.segments.max()) == 2
