"""Every matrix pruned to several levels, made once: a policy of the search is then looked up, not solved.

Levels are steps of an equal number of weights for every matrix, so that one matrix up and another down leaves the total as it was
(EvoPress, Sieberling et al. 2025, arXiv 2410.14649). Entries are solved on the dense model's activations and compose freely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from models.run_state import read_record, write_tensors
from pruning.static.allocation import Kept
from pruning.static.blocks import walk
from pruning.static.criteria import Criterion, solve_block
from pruning.static.data import Sample
from pruning.static.patterns import Pattern

Policy = tuple[int, ...]
"""A level for every matrix, in the order of the database's names; their sum is zero, so the total is the target."""


class Database:
    """Levels of matrices and their dense weights, one safetensors file a block; read when asked for.

    middle: weights kept at level 0; step: weights more for each level; limits: the lowest and highest level of each matrix.
    """

    def __init__(self, directory: Path, middle: Kept, step: int, limits: Mapping[str, tuple[int, int]]) -> None:
        self.directory, self.middle, self.step, self.limits = directory, middle, step, dict(limits)
        self.names = list(middle)

    def kept(self, policy: Policy) -> Kept:
        return {name: self.middle[name] + level * self.step for name, level in zip(self.names, policy, strict=True)}

    def weight(self, name: str, level: int | None) -> Tensor:
        """A matrix at a level, or dense."""
        with safe_open(self._path(name), "pt") as file:
            return file.get_tensor(_key(name, level))

    def distances(self) -> dict[tuple[str, int], float]:
        """||W - W dense||² / ||W dense||² of every entry (Frobenius)."""
        found = {}
        for name in self.names:
            dense = self.weight(name, None).float()
            for level in self.levels(name):
                found[name, level] = float((self.weight(name, level).float() - dense).square().sum() / dense.square().sum())
        return found

    def levels(self, name: str) -> range:
        low, high = self.limits[name]
        return range(low, high + 1)

    def _path(self, name: str) -> Path:
        return self.directory / f"{'.'.join(name.split('.')[:2])}.safetensors"


def plan(sizes: Mapping[str, int], middle: Kept, levels: int) -> tuple[int, dict[str, tuple[int, int]]]:
    """The step, half of what the median matrix can give or take over `levels`, and each matrix's limits: `levels` at most, and
    never below nothing or above everything, which a small matrix reaches in fewer."""
    typical = sorted(sizes, key=lambda name: sizes[name])[len(sizes) // 2]
    step = max(1, min(middle[typical], sizes[typical] - middle[typical]) // (2 * levels))
    limits = {
        name: (-min(levels, middle[name] // step), min(levels, (size - middle[name]) // step)) for name, size in sizes.items()
    }
    return step, limits


def build(
    database: Database, model: LlavaForConditionalGeneration, tower: str, samples: Sequence[Sample], visual_weight: float,
    method: Criterion, pattern: Pattern, progress: Callable[[], None],
) -> dict[str, float]:  # fmt: skip
    """Solve what is missing on disk, block by block. Returns the dampings that were raised."""
    database.directory.mkdir(parents=True, exist_ok=True)
    retried: dict[str, float] = {}
    for block, calls in walk(model, tower, samples, visual_weight):
        path = database.directory / f"{block.name}.safetensors"
        if not path.exists():
            kept = {
                name: [database.middle[name] + level * database.step for level in database.levels(name)] for name in block.linears()
            }
            solved, raised = solve_block(block, calls, method, kept, pattern)
            entries = {
                _key(name, level): weight
                for name, weights in solved.items()
                for level, weight in zip(database.levels(name), weights, strict=True)
            }
            entries |= {_key(name, None): linear.weight for name, linear in block.linears().items()}
            write_tensors(path, entries, {"damping": raised})
        retried |= read_record(path)["damping"]
        progress()
    return retried


class Installed:
    """A model's matrices and the policy whose weights they hold."""

    def __init__(self, linears: Mapping[str, nn.Linear], database: Database) -> None:
        self._linears, self._database = linears, database
        self._levels: dict[str, int | None] = dict.fromkeys(linears)  # None is dense

    def install(self, policy: Policy | None) -> None:
        """Write the policy's weights, or the dense ones; what is there already is not written again."""
        for name, level in zip(self._database.names, policy or [None] * len(self._levels), strict=True):
            if self._levels[name] != level:
                with torch.no_grad():
                    self._linears[name].weight.copy_(self._database.weight(name, level))
                self._levels[name] = level


def _key(name: str, level: int | None) -> str:
    return f"{name}/{'dense' if level is None else level}"
