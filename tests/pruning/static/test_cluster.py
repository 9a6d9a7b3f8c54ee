"""The search's evaluations on a real local Ray cluster of two workers, and in one worker alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from models.checkpoint import open_transformers
from pruning.samples import WORLD, read
from pruning.static.allocation import uniform
from pruning.static.blocks import linears
from pruning.static.database import Database, level_grid
from pruning.static.evaluate import RayEvaluator, RayWorker
from pruning.static.fitness import Divergence
from pruning.static.packing import pack
from tests.pruning.static.tiny_search import prepare
from tests.server.tiny import write


@pytest.fixture
def cluster():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield "local"
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_two_workers_find_what_one_process_finds(tmp_path: Path, cluster: str):
    setting = prepare(tmp_path, 6)
    local, divergence = setting.local, setting.divergence
    rest = [0] * (len(setting.database.names) - 2)
    policies = [(0, 0, *rest), (1, -1, *rest), (-1, 1, *rest)]
    spread = RayEvaluator(cluster, setting.checkpoint, divergence.references, setting.database, divergence.model.dtype)
    assert spread(policies, [0, 2, 5]) == pytest.approx(local(policies, [0, 2, 5]), rel=1e-3)
    changed = {name: value * 0.5 for name, value in divergence.model.model.multi_modal_projector.state_dict().items()}
    before = local(policies[:1], range(6))
    for evaluator in (local, spread):
        evaluator.set_projector(changed)
    assert spread(policies[:1], range(6)) == pytest.approx(local(policies[:1], range(6)), rel=1e-3)
    assert local(policies[:1], range(6)) != before


def test_a_worker_computes_in_the_dtype_of_the_search(tmp_path: Path):
    checkpoint = write(tmp_path / "dense")
    LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(checkpoint)
    source = open_transformers(checkpoint, dtype="float32")
    divergence = Divergence.from_dense(source.model, [pack(source.preprocessor, sample) for sample in read(WORLD, 2, seed=0)])
    sizes = {name: linear.weight.numel() for name, linear in linears(source.model).items()}
    half = uniform(sizes, 0.5)
    database = Database(tmp_path / "database", checkpoint, half, *level_grid(sizes, half, 2))
    worker = RayWorker(checkpoint, divergence.references, database, "cpu", torch.float32)
    assert worker.evaluate(None, [0, 1]) == pytest.approx(0, abs=1e-6), "the dense policy"
