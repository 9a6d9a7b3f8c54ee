"""Block-wise reconstruction: what a mask left is trained until the block puts out what the dense one did."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from pruning.static.blocks import Block, Call

RATE = 3e-4
BATCH = 8


def reconstruct(block: Block, calls: Sequence[Call], wanted: Sequence[Tensor], steps: int, seed: str) -> tuple[float, float]:
    """Lower the mean squared error of the block's output against `wanted` [1, n, width] of each call; zeros stay zero.

    Returns the error before and after, as a share of the mean square of `wanted`; what is no better is put back. (Ours:
    SparseGPT's layer objective, taken over the whole block as in knowledge distillation, by Adam with a cosine.)
    """
    weights = [linear.weight for linear in block.linears().values()]
    masks = [weight != 0 for weight in weights]
    pruned = [weight.detach().clone() for weight in weights]
    copies = [weight.detach().float().clone() for weight in weights]
    optimizer = torch.optim.Adam(copies, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    rng = Random(seed)
    before = _error(block, calls, wanted)
    for weight in weights:
        weight.requires_grad_(True)
    for _ in range(steps):
        chosen = rng.sample(range(len(calls)), min(BATCH, len(calls)))
        with torch.enable_grad():
            losses = [F.mse_loss(calls[i].run(block).float(), wanted[i].float()) for i in chosen]
            gradients = torch.autograd.grad(torch.stack(losses).mean(), weights)
        for copy, gradient, mask in zip(copies, gradients, masks, strict=True):
            copy.grad = gradient.float() * mask
        optimizer.step()
        schedule.step()
        _write(weights, copies, masks)
    for weight in weights:
        weight.requires_grad_(False)
    after = _error(block, calls, wanted)
    if not after < before:  # NaN included
        with torch.no_grad():
            for weight, value in zip(weights, pruned, strict=True):
                weight.copy_(value)
        return before, before
    return before, after


@torch.no_grad()
def _write(weights: Sequence[Tensor], copies: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    for weight, copy, mask in zip(weights, copies, masks, strict=True):
        weight.copy_(copy * mask)


@torch.no_grad()
def _error(block: Block, calls: Sequence[Call], wanted: Sequence[Tensor]) -> float:
    wrong = sum(float((call.run(block).float() - out.float()).square().sum()) for call, out in zip(calls, wanted, strict=True))
    return wrong / sum(float(out.float().square().sum()) for out in wanted)
