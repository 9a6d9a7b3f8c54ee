"""Training sequences hold what serving asks, and batches repeat."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch

from checkpoints.embedded.build import EOS
from checkpoints.embedded.data import GRID, IGNORE, LONG_TYPES, Batches, Mix, Packer, patch_labels, presence_labels, questions
from checkpoints.embedded.train import STAGES
from checkpoints.world import FAMILIES, WHATS, Mark, draw
from models.preprocess import Preprocessor
from tests.checkpoints.embedded.sequences import ALL, TOKENIZER, conversations
from tests.server.tiny import VISUAL, config, processor

EVEN = (1,) * len(FAMILIES)


# ---- sequences


@pytest.mark.parametrize("index", range(4))
def test_sequences_are_the_prompts_that_serving_makes(index):
    """Token for token, positions too, for every type of question: what is learned is what will be asked."""
    preprocessor = Preprocessor(processor(), config())
    scene = draw("train", index)
    packed = Packer(TOKENIZER, VISUAL).pack(scene.questions, ALL, Random(0))
    for question, conversation in zip(scene.questions, conversations(packed), strict=True):
        prompt = preprocessor.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}])
        reply = TOKENIZER(f" {question.answer}{EOS}", add_special_tokens=False).input_ids
        assert conversation["ids"].tolist() == prompt + reply
        assert conversation["positions"].tolist() == list(range(len(prompt + reply)))
        assert conversation["labels"].tolist() == [IGNORE] * len(prompt) + reply


def test_follow_up_turns_are_the_chats_that_serving_makes():
    preprocessor = Preprocessor(processor(), config())
    first, second, third, fourth = draw("train", 0).questions[:4]
    packed = Packer(TOKENIZER, VISUAL).pack([first, second, third, fourth], replace(ALL, follow_up=1.0), Random(0))
    long, short = conversations(packed)  # three turns at most, then another conversation
    chat: list[dict[str, Any]] = []
    for question in (first, second, third):
        image = [] if chat else [{"type": "image"}]
        chat.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
        asked = preprocessor.prompt(chat)
        assert long["ids"].tolist()[: len(asked)] == asked
        chat.append({"role": "assistant", "content": question.answer})
    assert long["positions"].tolist() == list(range(len(long["ids"])))
    learned = TOKENIZER.decode(long["labels"][long["labels"] != IGNORE])
    assert learned == "".join(f" {question.answer}{EOS}" for question in (first, second, third))
    assert short["positions"].tolist() == list(range(len(short["ids"])))


@pytest.mark.parametrize(("stage", "index"), [(stage, index) for stage in STAGES if stage.mix for index in range(3)])
def test_sequences_fit_and_are_filled(stage, index):
    rng, visual = Random(index), (GRID // stage.pool) ** 2
    scene = draw("train", index)
    packed = Packer(TOKENIZER, visual).pack(questions(scene, stage.mix, rng), stage.mix, rng)
    assert {len(part) for part in packed.values()} == {stage.mix.length}
    padding = packed["segments"] == -1
    assert (packed["labels"][padding] == IGNORE).all()
    assert (packed["ids"] == TOKENIZER.convert_tokens_to_ids("<image>")).sum() == visual
    assert len(conversations(packed)) >= 1
    if stage.mix.long:
        first = TOKENIZER.decode([i for i in conversations(packed)[0]["labels"] if i != IGNORE])
        assert first.startswith(tuple(f" {q.answer}{EOS}" for q in scene.questions if q.type in LONG_TYPES)), "long ones first"


def test_pooled_pictures_leave_text_at_the_position_it_will_have():
    question = draw("train", 0).questions[:1]
    full, pooled = (Packer(TOKENIZER, count).pack(question, ALL, Random(0)) for count in (VISUAL, VISUAL // 4))
    texts = [packed["positions"][packed["segments"] == 1].tolist() for packed in (full, pooled)]
    assert texts[0] == texts[1]
    image = TOKENIZER.convert_tokens_to_ids("<image>")
    assert pooled["positions"][pooled["ids"] == image].tolist() == full["positions"][full["ids"] == image].tolist()[::4]


def test_of_a_drill_the_values_are_learned():
    scene = next(s for s in (draw("train", i, "charts") for i in range(9)) if s.drills)
    drill = next(d for d in scene.drills if d.type == "height")
    (conversation,) = conversations(Packer(TOKENIZER, VISUAL).pack([drill], ALL, Random(0)))
    learned = conversation["labels"][conversation["labels"] != IGNORE]
    assert TOKENIZER.decode(learned) == "".join(f" {value}" for _, value in drill.pairs)
    assert "".join(f" {key} {value}" for key, value in drill.pairs) in TOKENIZER.decode(conversation["ids"])


# ---- labels and batches


def test_patches_are_labelled_with_what_stands_on_them():
    what, color, detail = patch_labels([Mark((0, 0, 96, 96), "plate", "red"), Mark((16, 24, 32, 32), "7", "blue", 2)])
    assert (what[3, 2:4] == what[3, 2]).all()
    assert what[3, 2] != what[0, 0] == what[11, 11] != 0
    assert (color[3, 2], detail[3, 2]) != (color[0, 0], detail[0, 0])
    assert (what != what[0, 0]).sum() == 2


def test_nothing_is_too_small_or_too_far_out_for_a_label():
    labels = patch_labels([Mark((41, 41, 43, 43), "star", "red", 1)])
    assert (labels[0] > 0).sum() == 1
    assert labels[0, 5, 5] > 0
    assert (patch_labels([Mark((-3, -3, 5, 5), "star", "red", 1)])[0] > 0).any()


def test_presence_tells_pairs():
    marks = [Mark((0, 0, 9, 9), "star", "red"), Mark((0, 0, 9, 9), "circle", "blue"), Mark((0, 0, 9, 9), "gap", None)]
    assert presence_labels(marks).sum() == 3
    assert (presence_labels(marks) != presence_labels([Mark((0, 0, 9, 9), "star", "blue"), *marks[1:]])).sum() == 2


@pytest.mark.parametrize("mix", [None, Mix(length=304, long=1, follow_up=0.5)])
def test_a_batch_is_the_same_wherever_training_begins(mix):
    packer = Packer(TOKENIZER, VISUAL)
    whole = list(Batches(packer, mix, 2, range(3), 500, EVEN))
    late = list(Batches(packer, mix, 2, range(2, 3), 500, EVEN))
    assert len(late) == 1
    assert late[0].keys() == whole[2].keys()
    assert all(torch.equal(late[0][key], whole[2][key]) for key in late[0])
    assert not torch.equal(whole[0]["pixels"], whole[1]["pixels"])


def test_a_stage_may_see_more_of_one_family():
    (batch,) = Batches(Packer(TOKENIZER, VISUAL), None, 8, range(1), 500, tuple(int(f == "grids") for f in FAMILIES))
    assert set(batch["patches"][:, 0].unique().tolist()) <= {0, WHATS.index("cell") + 1, WHATS.index("gap") + 1}
