"""The criteria behind one interface: gather statistics of a matrix's input, prepare them once, prune to any sparsities.

GPTQ, which rounds, shares all of it but the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pruning.static import alps, magnitude, obs, wanda
from pruning.static.blocks import Block, BlockInput, input_statistics
from pruning.static.masks import Pattern


class Method(Protocol):
    """What the criteria and `gptq` hold; statistics and what is prepared from them are each one's own."""

    def empty(self, columns: int, device: torch.device | str = "cpu") -> Any:
        """The statistics of no rows."""

    def accumulate(self, statistics: Any, rows: Tensor) -> None:
        """Add input rows [n, in]."""

    def prepare(self, statistics: Any) -> Any:
        """What changing a weight needs of them. Raises ValueError where they cannot be used."""


class Criterion(Method, Protocol):
    """What the modules `magnitude`, `wanda`, `obs` and `alps` hold."""

    def prune(self, weight: Tensor, prepared: Any, nonzeros: int, pattern: Pattern) -> Tensor:
        """The weight [out, in] with `nonzeros` weights left."""


CRITERIA: Mapping[str, Criterion] = {"magnitude": magnitude, "wanda": wanda, "obs": obs, "alps": alps}


@torch.no_grad()
def for_each_matrix(
    block: Block, inputs: Sequence[BlockInput], method: Method, change: Callable[[str, Tensor, Any], None]
) -> dict[str, float]:
    """Give `change` every matrix of a block, its name, its weight and what the method prepared, from one pass over `inputs`.

    Returns the damping of each Hessian that needed more than usual. Errors name the matrix.
    """
    damping: dict[str, float] = {}
    for group, statistics in zip(block.groups, input_statistics(block, inputs, method.empty, method.accumulate), strict=True):
        names = [f"{block.name}.{short}" for short in group]
        name = names[0]
        try:
            prepared = method.prepare(statistics)
            for name, short in zip(names, group, strict=True):
                weight = block.linear(short).weight
                if not weight.isfinite().all():
                    raise ValueError("the weights are not finite")
                change(name, weight, prepared)
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error
        if isinstance(prepared, obs.Factor) and prepared.retries:
            damping |= dict.fromkeys(names, prepared.damping)
    return damping


def pruned_weights(
    block: Block, inputs: Sequence[BlockInput], criterion: Criterion, nonzeros: Mapping[str, Sequence[int]], pattern: Pattern,
    keep: Callable[[str, int, Tensor], None],
) -> dict[str, float]:  # fmt: skip
    """Every matrix of a block pruned to each number of `nonzeros`, from one pass over `inputs`; the block itself is not changed.

    `keep` is given each weight as it is made: a matrix's name, which of its numbers, and the weight. Returns what
    `for_each_matrix` does.
    """

    def prune(name: str, weight: Tensor, prepared: Any) -> None:
        for place, count in enumerate(nonzeros[name]):
            keep(name, place, criterion.prune(weight, prepared, count, pattern))

    return for_each_matrix(block, inputs, criterion, prune)
