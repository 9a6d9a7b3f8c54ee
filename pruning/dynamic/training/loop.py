"""The router's training loop, resumable, and what its scores learn: to predict attention and the costs of freezing layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor, nn

from models.run_state import RunState
from pruning.dynamic.router import Router, RouterOutput
from pruning.dynamic.training.config import TrainingConfig
from pruning.dynamic.training.dataset import RouterDataset

LEAST = 1e-4
"""Attention and divergence below this are none."""
LAYER_WEIGHT = 0.1
"""Of the layers' error beside that of the tokens."""
SAVE_EVERY = 200
"""Steps between two saves."""
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Questions of one step, their pictures [n, tokens, width], and what the router makes of them."""

    data: RouterDataset
    visual: Tensor
    output: RouterOutput


def score(router: Router, embed: Embed, data: RouterDataset) -> Batch:
    """Run the router on all questions of `data`."""
    device = router.layer_tokens.device
    visual = data.visual[data.picture].to(device)
    text = data.text.to(device)
    return Batch(data, visual, router(visual, embed(text.clamp_min(0)), text >= 0))


def score_loss(batch: Batch) -> Tensor:
    """Mean squared error of the logarithms of attention and of divergence."""
    device = batch.visual.device
    attention, costs = batch.data.attention.to(device), batch.data.freezing_costs.to(device)
    error = F.mse_loss(batch.output.token_scores, attention.clamp_min(LEAST).log())
    measured = ~costs.isnan()
    if measured.any():
        layers = F.mse_loss(batch.output.layer_scores[measured], costs[measured].clamp_min(LEAST).log())
        error = error + LAYER_WEIGHT * layers
    return error


def train(
    name: str, learner: nn.Module, data: RouterDataset, config: TrainingConfig, steps: int, learning_rate: float,
    loss_of: Callable[[int, RouterDataset], Tensor], state: RunState, progress: Progress,
) -> None:  # fmt: skip
    """Take `steps` steps of AdamW on questions drawn by seed and step; one that was stopped goes on. Raises ValueError where the
    training diverges."""
    optimizer = torch.optim.AdamW(learner.parameters(), learning_rate, weight_decay=0.02)
    start = _restore(name, state, learner, optimizer)
    task = progress.add_task(name, total=steps, completed=start)
    questions = (data.picture < config.training_pictures).nonzero()[:, 0]
    for step in range(start, steps):
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        drawn = torch.randint(len(questions), (config.batch_size,), generator=draw)
        loss = loss_of(step, data.of(questions[drawn]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(learner.parameters(), 1.0)
        if not norm.isfinite():
            raise ValueError(f"{name}: the error or its gradient is not finite at step {step + 1}; lower its learning rate")
        optimizer.step()
        progress.update(task, advance=1, description=f"{name}, error {float(loss.detach()):.3f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            _save(name, state, learner, optimizer, step + 1)


def _schedule(step: int, steps: int) -> float:
    """Warm up, then fall to a hundredth."""
    return min(1.0, (step + 1) / min(100, steps)) * max(0.01, 1 - step / steps)


@torch.no_grad()
def explained_variance(router: Router, embed: Embed, data: RouterDataset) -> dict[str, float]:
    """R² of the token scores and of the layer scores."""
    tokens, layers = [], []
    for part in torch.split(torch.arange(len(data.picture)), 64):
        batch = score(router, embed, data.of(part))
        tokens.append((batch.output.token_scores.cpu(), batch.data.attention.clamp_min(LEAST).log()))
        measured = ~batch.data.freezing_costs.isnan()
        costs = batch.data.freezing_costs[measured].clamp_min(LEAST).log()
        layers.append((batch.output.layer_scores.cpu()[measured], costs))
    return {"token_scores": _r_squared(tokens), "layer_scores": _r_squared(layers)}


def _r_squared(pairs: list[tuple[Tensor, Tensor]]) -> float:
    scores, wanted = (torch.cat(part) for part in zip(*pairs, strict=True))
    if not len(wanted):
        return 0.0
    return round(1 - float(((scores - wanted) ** 2).sum() / ((wanted - wanted.mean()) ** 2).sum().clamp_min(1e-9)), 4)


def _save(name: str, state: RunState, learner: nn.Module, optimizer: torch.optim.AdamW, step: int) -> None:
    tensors = {f"learner.{key}": tensor for key, tensor in learner.state_dict().items()}
    for number, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": tensor for key, tensor in moments.items()}
    state.write_tensors(name, tensors, {"step": step})


def _restore(name: str, state: RunState, learner: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """The step to go on with."""
    stored = state.read_tensors(name)
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
