"""What a search needs of a tiny checkpoint: the database of its matrices' levels, and the dense answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.checkpoint import open_transformers
from pruning.static import data
from pruning.static.allocation import uniform
from pruning.static.blocks import linears
from pruning.static.criteria import criterion
from pruning.static.database import Database, Installed, build, plan
from pruning.static.evaluate import Local
from pruning.static.fitness import Proxy
from pruning.static.patterns import Unstructured
from tests.server.tiny import write


@dataclass
class Setting:
    checkpoint: Path
    database: Database
    proxy: Proxy
    local: Local


def prepare(directory: Path, count: int) -> Setting:
    """Magnitude at half the weights, two levels on either side, judged on `count` samples."""
    checkpoint = write(directory / "dense")
    source = open_transformers(checkpoint)
    samples = data.embedded_world(source.preprocessor, count, seed=0)
    matrices = linears(source.model, ["language"])
    sizes = {name: linear.weight.numel() for name, linear in matrices.items()}
    middle = uniform(sizes, 0.5)
    database = Database(directory / "database", middle, *plan(sizes, middle, 2))
    proxy = Proxy.of(source.model, samples)
    build(database, source.model, "language", samples, 1.0, criterion("magnitude"), Unstructured(), lambda: None)
    return Setting(checkpoint, database, proxy, Local(proxy, Installed(matrices, database)))
