"""The search's evaluations on a real local Ray cluster of two workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.checkpoint import open_transformers
from pruning.static import data
from pruning.static.allocation import uniform
from pruning.static.blocks import linears
from pruning.static.criteria import criterion
from pruning.static.database import Database, Installed, build, plan
from pruning.static.evaluate import Cluster, Local
from pruning.static.fitness import Proxy
from pruning.static.patterns import Unstructured
from tests.server.tiny import write

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield "local"
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_workers_find_what_one_process_finds(tmp_path: Path, cluster: str):
    checkpoint = write(tmp_path / "dense")
    source = open_transformers(checkpoint)
    samples = data.embedded_world(source.preprocessor, 6, seed=0)
    matrices = linears(source.model, ["language"])
    sizes = {name: linear.weight.numel() for name, linear in matrices.items()}
    middle = uniform(sizes, 0.5)
    database = Database(tmp_path / "database", middle, *plan(sizes, middle, 2))
    proxy = Proxy.of(source.model, samples)
    build(database, source.model, "language", samples, 1.0, criterion("magnitude"), Unstructured(), lambda: None)
    policies = [(0,) * len(sizes), (1, -1, *[0] * (len(sizes) - 2)), (-1, 1, *[0] * (len(sizes) - 2))]
    local = Local(proxy, Installed(matrices, database))
    spread = Cluster(cluster, str(checkpoint), proxy.references, database)
    assert spread(policies, [0, 2, 5]) == pytest.approx(local(policies, [0, 2, 5]), rel=1e-3)
    changed = {name: value * 0.5 for name, value in source.model.model.multi_modal_projector.state_dict().items()}
    before = local(policies[:1], range(6))
    for evaluator in (local, spread):
        evaluator.use(changed)
    assert spread(policies[:1], range(6)) == pytest.approx(local(policies[:1], range(6)), rel=1e-3)
    assert local(policies[:1], range(6)) != before
