"""Training: the loss of packed conversations, and a run that survives being killed."""

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
from checkpoints.embedded.data import IGNORE, Packer, patch_labels
from checkpoints.embedded.grounding import GROUNDING_HEADS, WordClasses
from checkpoints.embedded.train import STAGES, Stage, Trainer, language_loss, learning_rate
from checkpoints.world import draw
from models.checkpoint import load
from models.random_llava import random_model
from tests.checkpoints.embedded.sequences import ALL, TOKENIZER, conversations
from tests.server.tiny import VISUAL, answer, config, new_engine, processor

SCALE = 0.002
LAYERS = 1 + max(head.layer for head in GROUNDING_HEADS)


def test_conversations_side_by_side_cost_what_each_costs_alone():
    """The packed loss, with its mask, is the mean over what transformers computes for one conversation at a time."""
    model = random_model(config(layers=LAYERS), seed=3)
    model.set_attn_implementation("eager")
    scene, packer = draw("train", 1), Packer(TOKENIZER, VISUAL)
    packed = packer.pack(scene.questions[:4], replace(ALL, length=400, follow_up=0.5), Random(1))
    assert len(conversations(packed)) > 1
    pixels = torch.from_numpy(np.asarray(scene.image).transpose(2, 0, 1).copy())[None]
    batch = {"pixels": pixels} | {key: torch.from_numpy(row)[None] for key, row in packed.items()}
    batch["patches"] = torch.from_numpy(patch_labels(scene.marks))[None]
    with torch.no_grad():
        loss, _, right = language_loss(model, batch, STAGES[-1], packer.first_visual, WordClasses(TOKENIZER))
        expected = [_alone(model, one, scene) for one in conversations(packed)]
    losses, hits = (torch.cat(parts) for parts in zip(*expected, strict=True))
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-3)
    assert right == pytest.approx(hits.float().mean().item(), abs=1e-6)


def _alone(model: LlavaForConditionalGeneration, conversation: dict[str, np.ndarray], scene: Any) -> tuple[torch.Tensor, ...]:
    pixels = processor().image_processor(scene.image, return_tensors="pt")["pixel_values"]
    logits = model(input_ids=torch.from_numpy(conversation["ids"])[None], pixel_values=pixels).logits[0, :-1]
    wanted = torch.from_numpy(conversation["labels"])[1:]
    answered = wanted != IGNORE
    logits, wanted = logits[answered], wanted[answered]
    return F.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1) == wanted


def test_the_learning_rate_warms_up_and_cools_down():
    stage = Stage("any", 1000, 1, lr=1.0)
    rates = [learning_rate(step, stage) for step in range(1000)]
    assert 0 < rates[0] < 0.05
    assert max(rates) == pytest.approx(1.0, abs=0.05)
    assert rates.index(max(rates)) in range(90, 110)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
    assert all(math.isfinite(rate) for rate in rates)


# ---- runs


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
