"""Every matrix pruned to several levels, made once: a policy of the search is then looked up, not computed.

Levels are steps of an equal number of weights for every matrix: one matrix a level up and another one down leave the total as it
was (EvoPress, Sieberling et al. 2025, arXiv 2410.14649). Entries are pruned on the dense model's activations and compose freely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.run_state import read_record, write_tensors
from models.saving import tensor_places, tensor_shapes
from pruning.static.allocation import Allocation, block_of
from pruning.static.blocks import Block, BlockInput, sequential
from pruning.static.compressed import compress, decompress
from pruning.static.criteria import Criterion, pruned_weights
from pruning.static.packing import PackedSample

Policy = tuple[int, ...]
"""A level for every matrix, in the order of the database's names; their sum is zero, so the total is the target."""


class Database:
    """Levels of matrices, compressed, one safetensors file a block, read when needed; dense weights are the `checkpoint`'s.

    level_0: nonzeros at level 0; step: nonzeros more for each level; limits: the lowest and highest level of each matrix.
    """

    def __init__(
        self, directory: Path, checkpoint: Path, level_0: Allocation, step: int, limits: Mapping[str, tuple[int, int]]
    ) -> None:
        self.directory, self.level_0, self.step, self.limits = directory, level_0, step, dict(limits)
        self.names = list(level_0)
        places, shapes = tensor_places(checkpoint.resolve()), tensor_shapes(checkpoint)
        self._dense = {name: places[f"{name}.weight"] for name in self.names}
        self._shapes = {name: shapes[f"{name}.weight"] for name in self.names}

    def nonzeros(self, name: str, level: int) -> int:
        return self.level_0[name] + level * self.step

    def allocation(self, policy: Policy) -> Allocation:
        return {name: self.nonzeros(name, level) for name, level in zip(self.names, policy, strict=True)}

    def weight(self, name: str, level: int | None) -> Tensor:
        """A matrix at a level, or dense, as the checkpoint has it."""
        if level is None:
            path, key = self._dense[name]
            with safe_open(path, "pt") as file:
                return file.get_tensor(key)
        with safe_open(self._path(name), "pt") as file:
            bits, values = (file.get_tensor(f"{name}/{level}/{part}") for part in ("bits", "values"))
        return decompress(bits, values, self._shapes[name])

    def distances(self) -> dict[tuple[str, int], float]:
        """||W - W dense||² / ||W dense||² of every entry (Frobenius)."""
        records = {block_of(name): read_record(self._path(name))["distances"] for name in self.names}
        return {
            (name, level): distance
            for name in self.names
            for level, distance in zip(self.levels(name), records[block_of(name)][name], strict=True)
        }

    @property
    def sizes(self) -> dict[str, int]:
        return {name: shape.numel() for name, shape in self._shapes.items()}

    def levels(self, name: str) -> range:
        low, high = self.limits[name]
        return range(low, high + 1)

    def _path(self, name: str) -> Path:
        return self.directory / f"{block_of(name)}.safetensors"


def level_grid(sizes: Mapping[str, int], level_0: Allocation, levels: int) -> tuple[int, dict[str, tuple[int, int]]]:
    """The step, half of what the median matrix can give or take over `levels`, and each matrix's limits: `levels` at most, and
    never below nothing or above everything, which a small matrix reaches in fewer. One level is a step of two: the half at once
    would break a matrix."""
    typical = sorted(sizes, key=lambda name: sizes[name])[len(sizes) // 2]
    step = max(1, min(level_0[typical], sizes[typical] - level_0[typical]) // (2 * max(levels, 2)))
    limits = {
        name: (-min(levels, level_0[name] // step), min(levels, (size - level_0[name]) // step)) for name, size in sizes.items()
    }
    return step, limits


def build(
    database: Database, model: PreTrainedModel, samples: Sequence[PackedSample], criterion: Criterion,
    progress: Callable[[], None],
) -> dict[str, float]:  # fmt: skip
    """Make what is missing on disk, block by block. Returns the dampings that were raised."""
    database.directory.mkdir(parents=True, exist_ok=True)
    damping: dict[str, float] = {}
    for block, inputs in sequential(model, samples):
        path = database.directory / f"{block.name}.safetensors"
        if not path.exists():
            _build_block(database, block, inputs, criterion, path)
        damping |= read_record(path)["damping"]
        progress()
    return damping


def _build_block(database: Database, block: Block, inputs: Sequence[BlockInput], criterion: Criterion, path: Path) -> None:
    linears = block.linears()
    nonzeros = {name: [database.nonzeros(name, level) for level in database.levels(name)] for name in linears}
    entries: dict[str, Tensor] = {}
    distances: dict[str, list[float]] = {name: [] for name in linears}

    def keep(name: str, place: int, weight: Tensor) -> None:
        entries.update({f"{name}/{database.levels(name)[place]}/{part}": held for part, held in compress(weight).items()})
        dense = linears[name].weight.float()
        distances[name].append(float((weight.float() - dense).square().sum() / dense.square().sum()))

    damping = pruned_weights(block, inputs, criterion, nonzeros, "unstructured", keep)
    write_tensors(path, entries, {"damping": damping, "distances": distances})


class PolicyLoader:
    """Writes a policy's weights into a model, and knows which are there."""

    def __init__(self, linears: Mapping[str, nn.Linear], database: Database) -> None:
        self._linears, self._database = linears, database
        self._levels: dict[str, int | None] = dict.fromkeys(linears)  # None is dense

    def load(self, policy: Policy | None) -> None:
        """Write the policy's weights, or the dense ones; what is there already is not written again."""
        for name, level in zip(self._database.names, policy or [None] * len(self._levels), strict=True):
            if self._levels[name] != level:
                with torch.no_grad():
                    self._linears[name].weight.copy_(self._database.weight(name, level))
                self._levels[name] = level
