"""The search's evaluations on a real local Ray cluster of two workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pruning.static.evaluate import RayEvaluator
from tests.pruning.static.tiny_search import prepare

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield "local"
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_workers_find_what_one_process_finds(tmp_path: Path, cluster: str):
    setting = prepare(tmp_path, 6)
    local, divergence = setting.local, setting.divergence
    rest = [0] * (len(setting.database.names) - 2)
    policies = [(0, 0, *rest), (1, -1, *rest), (-1, 1, *rest)]
    spread = RayEvaluator(cluster, setting.checkpoint, divergence.references, setting.database)
    assert spread(policies, [0, 2, 5]) == pytest.approx(local(policies, [0, 2, 5]), rel=1e-3)
    changed = {name: value * 0.5 for name, value in divergence.model.model.multi_modal_projector.state_dict().items()}
    before = local(policies[:1], range(6))
    for evaluator in (local, spread):
        evaluator.set_projector(changed)
    assert spread(policies[:1], range(6)) == pytest.approx(local(policies[:1], range(6)), rel=1e-3)
    assert local(policies[:1], range(6)) != before
