"""The three criteria behind one interface: gather statistics of a matrix's input, prepare them once, prune to any sparsities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pruning.static import magnitude, obs, wanda
from pruning.static.blocks import Block, BlockInput, input_statistics
from pruning.static.masks import Pattern


class Criterion(Protocol):
    """What the modules `magnitude`, `wanda` and `obs` hold; statistics and what is prepared from them are each one's own."""

    def empty(self, columns: int, device: torch.device | str = "cpu") -> Any:
        """The statistics of no rows."""

    def accumulate(self, statistics: Any, rows: Tensor) -> None:
        """Add input rows [n, in]."""

    def prepare(self, statistics: Any) -> Any:
        """What `prune` needs of them. Raises ValueError where they cannot be used."""

    def prune(self, weight: Tensor, prepared: Any, nonzeros: int, pattern: Pattern) -> Tensor:
        """The weight [out, in] with `nonzeros` weights left."""


CRITERIA: Mapping[str, Criterion] = {"magnitude": magnitude, "wanda": wanda, "obs": obs}


@torch.no_grad()
def pruned_weights(
    block: Block, inputs: Sequence[BlockInput], criterion: Criterion, nonzeros: Mapping[str, Sequence[int]], pattern: Pattern,
    keep: Callable[[str, int, Tensor], None],
) -> dict[str, float]:  # fmt: skip
    """Every matrix of a block pruned to each number of `nonzeros`, from one pass over `inputs`; the block itself is not changed.

    `keep` is given each weight as it is made: a matrix's name, which of its numbers, and the weight. Returns the damping of each
    Hessian that needed more than usual. Errors name the matrix.
    """
    damping: dict[str, float] = {}
    for group, statistics in zip(block.groups, input_statistics(block, inputs, criterion.empty, criterion.accumulate), strict=True):
        names = [f"{block.name}.{short}" for short in group]
        name = names[0]
        try:
            prepared = criterion.prepare(statistics)
            for name, short in zip(names, group, strict=True):
                weight = block.linear(short).weight
                if not weight.isfinite().all():
                    raise ValueError("the weights are not finite")
                for place, count in enumerate(nonzeros[name]):
                    keep(name, place, criterion.prune(weight, prepared, count, pattern))
        except ValueError as error:
            raise type(error)(f"{name}: {error}") from error
        if isinstance(prepared, obs.Factor) and prepared.retries:
            damping |= dict.fromkeys(names, prepared.damping)
    return damping
