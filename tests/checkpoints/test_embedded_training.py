"""The recipe: rows that say what serving will ask, and a training run that survives being killed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from checkpoints.embedded import train
from checkpoints.embedded.build import EOS
from checkpoints.embedded.data import GRID, IGNORE, LONG_TYPES, Batches, Mix, Packer, patch_labels, presence_labels, questions
from checkpoints.embedded.grounding import POINTERS, Words, pointing_loss
from checkpoints.embedded.train import STAGES, Stage, Trainer, language_loss, learning_rate
from checkpoints.world import FAMILIES, WHATS, Mark, Question, draw
from models.checkpoint import load
from models.preprocess import Preprocessor
from models.random_llava import random_model
from tests.server.tiny import VISUAL, answer, config, new_engine, processor

TOKENIZER = processor().tokenizer
ALL = Mix(rows=2000, long=1)
EVEN = (1,) * len(FAMILIES)


def talks(rows: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Each conversation with the prefix it sees, and nothing else."""
    numbers = range(1, rows["segments"].max() + 1)
    seen = [(rows["segments"] == 0) | (rows["segments"] == number) for number in numbers]
    return [{key: row[mask] for key, row in rows.items()} for mask in seen]


# ---- rows


@pytest.mark.parametrize("index", range(4))
def test_training_rows_are_the_prompts_that_serving_makes(index):
    """Token for token, positions too, for every type of question: what is learned is what will be asked."""
    preprocessor = Preprocessor(processor(), config(), VISUAL)
    scene = draw("train", index)
    rows = Packer(TOKENIZER, VISUAL).rows(scene.questions, ALL, Random(0))
    for question, talk in zip(scene.questions, talks(rows), strict=True):
        prompt = preprocessor.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]}])
        reply = TOKENIZER(f" {question.answer}{EOS}", add_special_tokens=False).input_ids
        assert talk["ids"].tolist() == prompt + reply
        assert talk["positions"].tolist() == list(range(len(prompt + reply)))
        assert talk["labels"].tolist() == [IGNORE] * len(prompt) + reply


def test_follow_up_turns_are_the_chats_that_serving_makes():
    preprocessor = Preprocessor(processor(), config(), VISUAL)
    first, second, third, fourth = draw("train", 0).questions[:4]
    rows = Packer(TOKENIZER, VISUAL).rows([first, second, third, fourth], replace(ALL, follow_up=1.0), Random(0))
    long, short = talks(rows)  # three turns at most, then another conversation
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
def test_rows_fit_and_are_filled(stage, index):
    rng, visual = Random(index), (GRID // stage.pool) ** 2
    scene = draw("train", index)
    rows = Packer(TOKENIZER, visual).rows(questions(scene, stage.mix, rng), stage.mix, rng)
    assert {len(row) for row in rows.values()} == {stage.mix.rows}
    padding = rows["segments"] == -1
    assert (rows["labels"][padding] == IGNORE).all()
    assert (rows["ids"] == TOKENIZER.convert_tokens_to_ids("<image>")).sum() == visual
    assert len(talks(rows)) >= 1
    if stage.mix.long:
        first = TOKENIZER.decode([i for i in talks(rows)[0]["labels"] if i != IGNORE])
        assert first.startswith(tuple(f" {q.answer}{EOS}" for q in scene.questions if q.type in LONG_TYPES)), "long ones first"


def test_pooled_pictures_leave_text_at_the_position_it_will_have():
    question = draw("train", 0).questions[:1]
    full, pooled = (Packer(TOKENIZER, count).rows(question, ALL, Random(0)) for count in (VISUAL, VISUAL // 4))
    texts = [rows["positions"][rows["segments"] == 1].tolist() for rows in (full, pooled)]
    assert texts[0] == texts[1]
    image = TOKENIZER.convert_tokens_to_ids("<image>")
    assert pooled["positions"][pooled["ids"] == image].tolist() == full["positions"][full["ids"] == image].tolist()[::4]


def test_conversations_side_by_side_cost_what_each_costs_alone():
    """The packed loss, with its mask, is the mean over what transformers computes for one conversation at a time."""
    model = random_model(config(layers=LAYERS), seed=3)
    model.set_attn_implementation("eager")
    scene, packer = draw("train", 1), Packer(TOKENIZER, VISUAL)
    rows = packer.rows(scene.questions[:4], replace(ALL, rows=400, follow_up=0.5), Random(1))
    assert len(talks(rows)) > 1
    pixels = torch.from_numpy(np.asarray(scene.image).transpose(2, 0, 1).copy())[None]
    batch = {"pixels": pixels} | {key: torch.from_numpy(row)[None] for key, row in rows.items()}
    batch["patches"] = torch.from_numpy(patch_labels(scene.marks))[None]
    with torch.no_grad():
        loss, _, right = language_loss(model, batch, STAGES[-1], packer.first_visual, Words(TOKENIZER))
        expected = [_alone(model, talk, scene) for talk in talks(rows)]
    losses, hits = (torch.cat(parts) for parts in zip(*expected, strict=True))
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-3)
    assert right == pytest.approx(hits.float().mean().item(), abs=1e-6)


def _alone(model: LlavaForConditionalGeneration, talk: dict[str, np.ndarray], scene: Any) -> tuple[torch.Tensor, ...]:
    pixels = processor().image_processor(scene.image, return_tensors="pt")["pixel_values"]
    logits = model(input_ids=torch.from_numpy(talk["ids"])[None], pixel_values=pixels).logits[0, :-1]
    wanted = torch.from_numpy(talk["labels"])[1:]
    answered = wanted != IGNORE
    logits, wanted = logits[answered], wanted[answered]
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


# ---- drills and pointing


def test_a_drill_is_scored_on_what_is_found_alone():
    scene = next(s for s in (draw("train", i, "charts") for i in range(9)) if s.drills)
    drill = next(d for d in scene.drills if d.type == "height")
    (talk,) = talks(Packer(TOKENIZER, VISUAL).rows([drill], ALL, Random(0)))
    assert TOKENIZER.decode(talk["labels"][talk["labels"] != IGNORE]) == "".join(f" {found}" for _, found in drill.pairs)
    assert "".join(f" {wanted} {found}" for wanted, found in drill.pairs) in TOKENIZER.decode(talk["ids"])


@pytest.mark.parametrize("family", FAMILIES)
def test_drills_agree_with_the_questions(family):
    """What a drill says of a color, a shape or a pair is what the question of its type answers, where the two meet."""
    met = 0
    for index in range(60):
        scene = draw("train", index, family)
        for drill, question in ((d, q) for d in scene.drills for q in scene.questions if d.type == q.type):
            for wanted, found in drill.pairs:
                words = wanted.split()
                if len(words) <= 2 and all(f" {word} " in question.text.replace("?", " ").replace(".", " ") for word in words):
                    if family == "shapes" and question.type in ("left_right", "above_below", "larger"):
                        continue
                    if question.type != "taller":
                        assert found == question.answer, (question, drill)
                        met += 1
    assert met > 10 or family == "signs"


@pytest.mark.parametrize("pool", [1, 2])
def test_a_word_is_to_look_at_what_it_names(pool, monkeypatch):
    """All attention on the first token costs nothing for a thing that is not there, and all there is for one that is."""
    mark = Mark((32, 32, 48, 48), "star", "red")
    packer = Packer(TOKENIZER, (GRID // pool) ** 2)
    visual = slice(packer.first_visual, packer.first_visual + packer.visual_tokens)

    def loss(question: str, on: int) -> float:
        rows = packer.rows([Question("any", question, "yes")], ALL, Random(0))
        batch = {key: torch.from_numpy(row)[None] for key, row in rows.items()}
        batch["patches"] = torch.from_numpy(patch_labels([mark]))[None]

        def looking(model: Any, pointer: Any, hidden: Any, rope: Any, row: torch.Tensor, at: torch.Tensor, mask: Any) -> Any:
            return F.one_hot(torch.full((len(at),), on), len(rows["ids"])).float()

        monkeypatch.setattr("checkpoints.embedded.grounding._attention", looking)
        states: Any = [None] * LAYERS
        nothing: Any = None
        return float(pointing_loss(nothing, states, batch, Words(TOKENIZER), nothing, nothing, visual, pool))

    inside = visual.start + 4 // pool * (GRID // pool) + 4 // pool
    assert loss("Is there a red star?", inside) == pytest.approx(0)
    assert loss("Is there a red star?", 0) > 10
    assert loss("Is there a blue cross?", 0) == pytest.approx(0)
    assert loss("Is there a blue star?", 0) == pytest.approx(loss("Is there a red cross?", 0)), "one word of three is there"


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


@pytest.mark.parametrize("mix", [None, Mix(rows=304, long=1, follow_up=0.5)])
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


def test_the_learning_rate_warms_up_and_cools_down():
    stage = Stage("any", 1000, 1, lr=1.0)
    rates = [learning_rate(step, stage) for step in range(1000)]
    assert 0 < rates[0] < 0.05
    assert max(rates) == pytest.approx(1.0, abs=0.05)
    assert rates.index(max(rates)) in range(90, 110)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
    assert all(math.isfinite(rate) for rate in rates)


# ---- runs

SCALE = 0.002
LAYERS = 1 + max(pointer.layer for pointer in POINTERS)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """The recipe with a tiny model, two pictures a batch and two steps a stage; each step is saved."""
    monkeypatch.setattr(train, "STAGES", tuple(replace(stage, batch=2, steps=1000) for stage in STAGES))
    monkeypatch.setattr(train, "SAVE_EVERY_S", -1)
    monkeypatch.setattr(train, "build_config", lambda tokenizer: config(layers=LAYERS))
    monkeypatch.setattr(train, "DataLoader", lambda batches, **options: batches)  # no processes for two pictures
    monkeypatch.setattr(Trainer, "_compile", lambda self: self.model.set_attn_implementation("eager"))
    return lambda work, seed=0: Trainer(work, seed, "cpu", scale=SCALE)


class Killed(BaseException):
    """As SIGKILL would: nothing of ours may catch it and tidy up."""


def die_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    real, left = Trainer._train_step, [steps]

    def step(self: Trainer, *args: Any) -> tuple[float, float]:
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(self, *args)

    monkeypatch.setattr(Trainer, "_train_step", step)


def same_state(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_killed_run_goes_on_to_the_same_weights(small, tmp_path, monkeypatch):
    whole = small(tmp_path / "whole")
    start = {key: value.clone() for key, value in whole.model.state_dict().items()}
    steps = sum(stage.steps for stage in whole.stages)
    assert steps == 2 * len(STAGES)
    whole.run()
    moved = [key for key, value in whole.model.state_dict().items() if not torch.equal(value, start[key])]
    for part in ("vision_tower.encoder", "multi_modal_projector", "language_model.layers", "lm_head"):
        assert any(part in key for key in moved), f"{part} was never trained"
    for kill in (0, 1, 4, steps - 1):  # within a stage and between two
        with monkeypatch.context() as patch:
            die_after(patch, kill)
            with pytest.raises(Killed):
                small(tmp_path / str(kill)).run()
        resumed = small(tmp_path / str(kill))
        assert sum(stage.steps for stage in resumed.stages[: resumed.stage_index]) + resumed.step == kill
        resumed.run()
        assert same_state(resumed.model, whole.model), kill
        assert same_state(resumed.heads, whole.heads), kill
    again = small(tmp_path / "whole")
    again.run()
    assert same_state(again.model, whole.model), "a finished run has nothing left to do"


def test_a_kill_while_saving_loses_only_what_was_not_saved(small, tmp_path, monkeypatch):
    trainer = small(tmp_path)
    trainer.step = 2
    trainer.save(None)

    def half(state: Any, path: Path) -> None:
        path.write_bytes(b"PK half a file")
        raise Killed

    monkeypatch.setattr(torch, "save", half)
    trainer.step = 3
    with pytest.raises(Killed):
        trainer.save(None)
    assert small(tmp_path).step == 2


def test_the_seed_chooses_weights_and_pictures(small, tmp_path):
    first, same, other = small(tmp_path / "a"), small(tmp_path / "b"), small(tmp_path / "c", seed=1)
    assert same_state(first.model, same.model)
    assert not same_state(first.model, other.model)


def test_the_tower_rests_while_the_language_model_learns(small, tmp_path, monkeypatch):
    towers: list[torch.Tensor] = []
    run = Trainer._run_stage

    def watched(self: Trainer, stage: Stage) -> None:
        run(self, stage)
        towers.append(torch.cat([p.detach().flatten() for p in self.model.model.vision_tower.parameters()]))

    monkeypatch.setattr(Trainer, "_run_stage", watched)
    small(tmp_path).run()
    for stage, (before, after) in zip(STAGES[1:], pairwise(towers), strict=True):
        assert torch.equal(before, after) != stage.train_tower, stage.name


def test_the_recipe_ends_in_a_checkpoint_that_serves(small, tmp_path):
    train.main(work=tmp_path / "work", out=tmp_path / "out", seed=0, device="cpu", scale=SCALE)
    checkpoint = load(tmp_path / "out")
    assert checkpoint.model.dtype == torch.bfloat16
    assert checkpoint.eos == {TOKENIZER.eos_token_id}
    assert answer(new_engine(checkpoint), 0, level="strong").finished.receipt.visual_tokens == 24
