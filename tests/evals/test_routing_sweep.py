"""The routes' table: what is stored is not run again, budgets are kept, and the baselines choose what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from checkpoints.world import draw
from evals import routing_report, routing_sweep
from models.checkpoint import load
from pruning.dynamic.router import Router, Shape
from pruning.dynamic.router_file import load_router
from tests.pruning.dynamic.tiny_router import expect, plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.server.tiny import write


@pytest.fixture(scope="module", name="directory")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tiny") / "tiny", layers=6)


def test_every_policy_keeps_to_every_budget_its_own_arithmetic_included(directory):
    checkpoint = load(directory)
    found = [one for one in routing_sweep.settings(checkpoint, None) if one.budget.endswith("FLOPs")]
    assert {one.policy for one in found} == set(routing_sweep.POLICIES) - set(routing_sweep.ROUTED)
    shown = routing_sweep.Shown.of(checkpoint, None, draw("test", 1), draw("test", 2))
    for setting in found:
        right, spent = routing_sweep.ask(setting, shown, seed=0)
        assert len(right) == len(spent) == len(draw("test", 1).questions)
        limit = float(setting.budget.split("%")[0]) / 100 + 0.03  # a longer question than the typical one
        assert max(flops for flops, _ in spent) <= limit, setting


def test_a_router_spends_less_where_less_is_to_be_spent(routed):
    checkpoint = load(routed)
    router = load_router(checkpoint)
    expect(router, torch.linspace(0.3, 0.95, router.shape.rungs).tolist())
    shown = routing_sweep.Shown.of(checkpoint, router, draw("test", 1), draw("test", 2))
    for policy in routing_sweep.ELASTIC:
        found = [one for one in routing_sweep.settings(checkpoint, router) if one.policy == policy and one.budget.endswith("FLOPs")]
        spent = [max(routing_sweep.ask(setting, shown, seed=0)[1]) for setting in found]
        assert spent == sorted(spent, reverse=True)


def test_what_is_stored_is_not_run_again(directory, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(routing_sweep.main)
    asked = [str(directory), "--runs", str(tmp_path / "runs.jsonl"), "--pictures", "2", "--only", "uniform, 0.111"]
    for _ in range(2):
        assert CliRunner().invoke(app, asked).exit_code == 0
    (entry,) = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert (entry["policy"], entry["keep"], entry["pictures"]) == ("uniform", 16, 2)
    assert 0 < entry["flops_ratio"] < 0.4


def test_the_page_and_its_picture_are_made_from_stored_runs(tmp_path):
    runs = tmp_path / "runs.jsonl"
    common = {"checkpoint": "embedded", "split": "test", "pictures": 2, "questions": 18, "keep": 16, "skip": 0}
    entries = [
        {"policy": "off", "budget": "off", "seed": 0, "accuracy": 0.9, "flops_ratio": 1.0},
        *({"policy": "router", "budget": "46% FLOPs", "seed": s, "accuracy": 0.8 + s / 100, "flops_ratio": 0.455} for s in (0, 1)),
        {"policy": "random", "budget": "46% FLOPs", "seed": 0, "accuracy": 0.45, "flops_ratio": 0.45},
    ]
    runs.write_text("".join(json.dumps(common | entry) + "\n" for entry in entries))
    routing_report.main(runs, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "| router | 80.5% ± 6.4 (89.4%; 46%) |" in page
    assert "| random | 45.0% (50.0%; 45%) |" in page
    assert (tmp_path / "page_embedded.png").stat().st_size > 1000


def test_another_questions_reading_is_of_the_same_picture(directory):
    checkpoint = load(directory)
    torch.manual_seed(0)
    router = Router(Shape(48, 6, 16))
    shown = routing_sweep.Shown.of(checkpoint, router, draw("test", 1), draw("test", 2))
    own, other = (shown.reading(0, shuffled=shuffled) for shuffled in (False, True))
    assert torch.equal(own.visual, other.visual)
    assert not torch.allclose(own.read.looks, other.read.looks, atol=1e-4)
    assert shown.reading(0, shuffled=False) is own
