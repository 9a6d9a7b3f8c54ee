"""A tiny checkpoint, and the same with a router that was hardly trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoint import Checkpoint, load
from models.run_state import RunState
from pruning.answers import Prompt
from pruning.dynamic.router import Router
from pruning.dynamic.training.config import TrainingConfig
from pruning.dynamic.training.dataset import RouterDataset, collect
from pruning.dynamic.training.train import Progress, run
from tests.server.tiny import ask, new_engine, write

QUICK: dict[str, Any] = {
    "pictures": 10, "questions": 2, "answer_tokens": 4, "steps": 30, "corrector_steps": 20, "batch_size": 4,
    "learning_rate": 3e-3, "corrector_learning_rate": 1e-3,
}  # fmt: skip
POINTS = 17
"""Operating points of the tiny checkpoint's router, the whole model aside."""
RISING = [0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99]


def expect(router: Router, agreement: Sequence[float]) -> None:
    """Whatever it reads, the router expects the answer to stay at each operating point with these probabilities."""
    router.agreement.out.weight.zero_()
    router.agreement.out.bias.copy_(torch.tensor(agreement).logit())


@pytest.fixture(scope="session", name="plain")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture(scope="session", name="routed")
def routed_checkpoint(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("routed") / "routed"
    run(TrainingConfig(**QUICK), plain, out, quiet=True)
    return out


@pytest.fixture(scope="module", name="data")
def router_dataset(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> RouterDataset:
    state = RunState(tmp_path_factory.mktemp("asked") / "out", {}, "")
    with Progress(disable=True) as progress:
        return collect(TrainingConfig(**{**QUICK, "data": "world", "questions": 4}), load(plain), state, progress)


def prompt_of(checkpoint: Checkpoint, text: str = "What color is the star?", picture: int = 0) -> Prompt:
    request = ask(new_engine(checkpoint), (picture,), text)
    return Prompt(request.prompt, checkpoint.model.vision(request.images[0].picture.pixels).tokens[0])
