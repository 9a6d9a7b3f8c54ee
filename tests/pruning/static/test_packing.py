"""Packed samples: questions side by side are each what they would be alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from checkpoints import world
from checkpoints.embedded.build import build_processor
from checkpoints.smol.build import CHAT_TEMPLATE as SMOL
from models import convert
from models.checkpoint import TransformersCheckpoint, open_transformers
from models.preprocess import Preprocessor
from pruning.samples import Sample, of_scene, read
from pruning.static.packing import PackedSample, pack
from tests.models import hub
from tests.server.tiny import config, write

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


TEMPLATES = {
    # the template, and the token that ends an answer; None where it writes a blank, and the tokenizer's own is taken
    "LLaVA-1.5": (hub.VICUNA, None),
    "LLaVA-1.5, converted": (convert.CONTENT + convert.VICUNA, "</s>"),
    "ChatML, smol": (SMOL, "<|im_end|>"),
    "ChatML, converted": (convert.CONTENT + convert.CHATML, "<|im_end|>"),
    "ChatML, hub": (hub.CHATML, "<|im_end|>"),
    "Llama-3": (convert.CONTENT + convert.LLAMA3, "<|eot_id|>"),
    "Mistral": (convert.CONTENT + convert.MISTRAL, "</s>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_those_of_the_chat_template(name: str) -> None:
    template, end = TEMPLATES[name]
    processor: Any = build_processor()
    marks = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    processor.tokenizer.add_special_tokens({"additional_special_tokens": marks})
    processor.chat_template = template.strip()
    asked = [("How many things are there?", "three"), ("What is red?", "the big ball"), ("Is it red?", "</s> no")]
    sample = pack(Preprocessor(processor, config()), Sample(SCENE.image, asked))
    for segment, (question, answer) in enumerate(asked[:2], 1):
        mine = sample.ids[(sample.segments == 0) | (sample.segments == segment)].tolist()
        content = [{"type": "image", "image": SCENE.image}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        whole = processor.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"][0]
        said = processor.tokenizer.decode(sample.ids[sample.answers & (sample.segments == segment)])
        assert said.strip() == f"{answer}{end or '</s>'}"
        *mine, last = mine
        assert mine == whole[: len(mine)]
        behind = processor.tokenizer.decode(whole[len(mine) :])
        assert behind.strip() == (end or "") and processor.tokenizer.decode(last) == (end or "</s>")
    last_answer = sample.ids[sample.answers & (sample.segments == 3)].tolist()
    assert last_answer.count(processor.tokenizer.eos_token_id) == (end in (None, "</s>")), "spelled out, it is text"
