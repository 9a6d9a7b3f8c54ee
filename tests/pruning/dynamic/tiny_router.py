"""A tiny checkpoint, and the same with a router that was hardly trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pruning.dynamic.router import Router
from pruning.dynamic.training.config import Lesson
from pruning.dynamic.training.train import run
from tests.server.tiny import write

QUICK: dict[str, Any] = {
    "pictures": 10, "questions": 2, "answer": 4, "steps": 30, "writing": 20, "batch": 4, "rate": 3e-3, "writing_rate": 1e-3,
}  # fmt: skip


def expect(router: Router, chances: Sequence[float]) -> None:
    """Whatever it reads, the router expects the answer to stay on each rung with these chances."""
    router.trust.out.zero_()
    router.trust.level.copy_(torch.tensor(chances).logit())


@pytest.fixture(scope="session", name="plain")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture(scope="session", name="routed")
def routed_checkpoint(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("routed") / "routed"
    run(Lesson(**QUICK), plain, out, quiet=True)
    return out
