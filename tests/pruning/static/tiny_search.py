"""What a search needs of a tiny checkpoint: the database of its matrices' levels, and the dense answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.checkpoint import open_transformers
from pruning.samples import WORLD, read
from pruning.static.allocation import uniform
from pruning.static.blocks import linears
from pruning.static.criteria import CRITERIA
from pruning.static.database import Database, PolicyLoader, build, level_grid
from pruning.static.evaluate import LocalEvaluator
from pruning.static.fitness import Divergence
from pruning.static.packing import pack
from tests.server.tiny import write


@dataclass
class Setting:
    checkpoint: Path
    database: Database
    divergence: Divergence
    local: LocalEvaluator


def prepare(directory: Path, count: int) -> Setting:
    """Magnitude at half the weights, two levels on either side, judged on `count` samples."""
    checkpoint = write(directory / "dense")
    source = open_transformers(checkpoint)
    samples = [pack(source.preprocessor, sample) for sample in read(WORLD, count, seed=0)]
    matrices = linears(source.model)
    sizes = {name: linear.weight.numel() for name, linear in matrices.items()}
    level_0 = uniform(sizes, 0.5)
    database = Database(directory / "database", checkpoint, level_0, *level_grid(sizes, level_0, 2))
    divergence = Divergence.from_dense(source.model, samples)
    build(database, source.model, samples, CRITERIA["magnitude"], lambda: None)
    return Setting(checkpoint, database, divergence, LocalEvaluator(divergence, PolicyLoader(matrices, database)))
