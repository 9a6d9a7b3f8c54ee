"""A router's two lessons, each resumable: to foresee what was watched, then to write into the tokens that stay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from models.run_state import RunState
from pruning.dynamic.router import Read, Router
from pruning.dynamic.training.config import Lesson
from pruning.dynamic.training.dataset import Watched

LEAST = 1e-4
"""Attention and divergence below this are none."""
SAVE_EVERY = 200
"""Steps between two saves."""
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Questions drawn for one step, and what the router read of them."""

    asked: Watched
    visual: Tensor
    read: Read


def read(router: Router, embed: Embed, asked: Watched) -> Batch:
    """Read questions as they were watched."""
    device = router.layers.device
    visual = asked.visual[asked.picture].to(device)
    seen = asked.words.to(device)
    return Batch(asked, visual, router(visual, embed(seen.clamp_min(0)), seen >= 0))


def foresight_error(batch: Batch) -> Tensor:
    """Mean squared error of the logarithms of attention and of divergence."""
    looks, costs = batch.asked.gaze.to(batch.visual.device), batch.asked.costs.to(batch.visual.device)
    error = F.mse_loss(batch.read.looks, looks.clamp_min(LEAST).log())
    measured = ~costs.isnan()
    if measured.any():
        error = error + 0.1 * F.mse_loss(batch.read.costs[measured], costs[measured].clamp_min(LEAST).log())
    return error


def learn(
    name: str, learner: nn.Module, watched: Watched, lesson: Lesson, steps: int, rate: float,
    loss_of: Callable[[int, Watched], Tensor], work: RunState, progress: Progress,
) -> None:  # fmt: skip
    """Take `steps` steps of AdamW on questions drawn by seed and step; one that was stopped goes on."""
    optimizer = torch.optim.AdamW(learner.parameters(), rate, weight_decay=0.02)
    start = _restore(name, work, learner, optimizer)
    task = progress.add_task(name, total=steps, completed=start)
    questions = (watched.picture < lesson.taught).nonzero()[:, 0]
    for step in range(start, steps):
        draw = torch.Generator().manual_seed(lesson.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = rate * _warmth(step, steps)
        loss = loss_of(step, watched.of(questions[torch.randint(len(questions), (lesson.batch,), generator=draw)]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        optimizer.step()
        progress.update(task, advance=1, description=f"{name}, error {float(loss.detach()):.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(name, work, learner, optimizer, step + 1)


def _warmth(step: int, steps: int) -> float:
    """Warm up, then fall to a hundredth."""
    return min(1.0, (step + 1) / min(100, steps)) * max(0.01, 1 - step / steps)


@torch.no_grad()
def foreseen(router: Router, embed: Embed, watched: Watched, questions: Tensor) -> dict[str, float]:
    """Share of the variance that is foreseen (R²), of attention and of the layers' costs, over some questions."""
    looks, costs = [], []
    for part in torch.split(questions, 64):
        batch = read(router, embed, watched.of(part))
        looks.append((batch.read.looks.cpu(), batch.asked.gaze.clamp_min(LEAST).log()))
        measured = ~batch.asked.costs.isnan()
        costs.append((batch.read.costs.cpu()[measured], batch.asked.costs[measured].clamp_min(LEAST).log()))
    return {"attention": _explained(looks), "costs": _explained(costs)}


def _explained(pairs: list[tuple[Tensor, Tensor]]) -> float:
    scores, wanted = (torch.cat(part) for part in zip(*pairs, strict=True))
    if not len(wanted):
        return 0.0
    return round(1 - float(((scores - wanted) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum().clamp_min(1e-9)), 4)


def _save(name: str, work: RunState, learner: nn.Module, optimizer: torch.optim.AdamW, step: int) -> None:
    tensors = {f"learner.{key}": tensor for key, tensor in learner.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": tensor for key, tensor in state.items()}
    work.write_tensors(name, tensors, {"step": step})


def _restore(name: str, work: RunState, learner: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """The step to go on with."""
    stored = work.read_tensors(name)
    if stored is None:
        return 0
    tensors, record = stored
    learner.load_state_dict({key.removeprefix("learner."): t for key, t in tensors.items() if key.startswith("learner.")})
    document = optimizer.state_dict()
    document["state"] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimizer."):
            _, number, part = key.split(".")
            document["state"].setdefault(int(number), {})[part] = tensor
    optimizer.load_state_dict(document)
    return int(record["step"])
