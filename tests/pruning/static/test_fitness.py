"""What the search minimises: divergence from the dense answers, and the structural risk."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from models.checkpoint import open_transformers
from pruning.static import data
from pruning.static.allocation import uniform
from pruning.static.blocks import linears
from pruning.static.criteria import criterion
from pruning.static.database import Database, Installed, build, plan
from pruning.static.evaluate import Local
from pruning.static.fitness import Proxy, Risk
from pruning.static.patterns import Unstructured
from tests.server.tiny import write


@dataclass
class Setting:
    database: Database
    proxy: Proxy
    local: Local


@pytest.fixture(scope="module", name="setting")
def tiny_setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    directory = tmp_path_factory.mktemp("fitness")
    source = open_transformers(write(directory / "dense"), dtype="float32")
    samples = data.embedded_world(source.preprocessor, 4, seed=0)
    matrices = linears(source.model, ["language"])
    sizes = {name: linear.weight.numel() for name, linear in matrices.items()}
    middle = uniform(sizes, 0.5)
    database = Database(directory / "database", middle, *plan(sizes, middle, 2))
    proxy = Proxy.of(source.model, samples)
    build(database, source.model, "language", samples, 1.0, criterion("magnitude"), Unstructured(), lambda: None)
    return Setting(database, proxy, Local(proxy, Installed(matrices, database)))


def test_dense_does_not_diverge_and_more_zeros_diverge_more(setting: Setting) -> None:
    assert setting.proxy.divergences(range(4)).tolist() == pytest.approx([0] * 4, abs=1e-6)
    low, middle, high = (tuple([level] * len(setting.database.names)) for level in (-2, 0, 2))
    fewest, some, most = setting.local([low, middle, high], range(4))
    assert 0 < most < some < fewest


def test_the_risk_is_the_distance_from_the_dense_weights(setting: Setting) -> None:
    database, policy = setting.database, (1, -1, *[0] * (len(setting.database.names) - 2))
    expected, total = 0.0, 0
    for name, level in zip(database.names, policy, strict=True):
        dense, entry = database.weight(name, None), database.weight(name, level)
        expected += dense.numel() * float((entry - dense).norm() ** 2 / dense.norm() ** 2)
        total += dense.numel()
    assert Risk(database)(policy) == pytest.approx(expected / total, rel=1e-4)
