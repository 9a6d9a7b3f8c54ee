"""The three criteria behind one shape: gather statistics of a matrix's input, prepare them once, solve for any number of ratios."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruning.static import magnitude, obs, wanda
from pruning.static.blocks import Block, Call, collect
from pruning.static.patterns import Pattern

NAMES = ("magnitude", "wanda", "obs")


@dataclass(frozen=True)
class Criterion:
    """empty(columns, device) -> statistics; accumulate(statistics, rows, weights); prepare(statistics) -> prepared;
    solve(weight, prepared, kept, pattern) -> weight."""

    empty: Callable[[int, torch.device], Any]
    accumulate: Callable[[Any, Tensor, Tensor], None]
    prepare: Callable[[Any], Any]
    solve: Callable[[Tensor, Any, int, Pattern], Tensor]


def criterion(name: str, damping: float = obs.DAMPING, block: int = obs.BLOCK) -> Criterion:
    """Raises ValueError for an unknown name."""
    if name == "obs":
        return Criterion(obs.empty, obs.accumulate, partial(obs.prepare, damping=damping), partial(obs.solve, block=block))
    if name not in NAMES:
        raise ValueError(f"criterion {name!r} is not one of {', '.join(NAMES)}")
    module = magnitude if name == "magnitude" else wanda
    return Criterion(module.empty, module.accumulate, module.prepare, module.solve)


@torch.no_grad()
def solve_block(
    block: Block, calls: Sequence[Call], method: Criterion, kept: dict[str, list[int]], pattern: Pattern
) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
    """Prune every matrix of a block to each of its `kept`, from one pass over `calls`; the block itself is not changed.

    Returns the weights by matrix, and the damping of each Hessian that needed more than was asked for. Errors name the matrix.
    """
    found: dict[str, list[Tensor]] = {}
    retried: dict[str, float] = {}
    for group, statistics in zip(block.groups, collect(block, calls, method.empty, method.accumulate), strict=True):
        names = [f"{block.name}.{short}" for short in group]
        name = names[0]
        try:
            prepared = method.prepare(statistics)
            for name, short in zip(names, group, strict=True):
                weight = block.linear(short).weight
                if not weight.isfinite().all():
                    raise ValueError("the weights are not finite")
                found[name] = [method.solve(weight, prepared, count, pattern) for count in kept[name]]
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error
        if isinstance(prepared, obs.Factor) and prepared.retries:
            retried |= dict.fromkeys(names, prepared.damping)
    return found, retried
