"""The routes' table: what is stored is not run again, budgets are kept, and what `auto` is held against."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from checkpoints.world import draw
from evals import routing_report, routing_sweep
from evals.routing_sweep import LAYERS, SHUFFLED, cost_weight_for
from models.checkpoint import load
from pruning.dynamic.levels import AUTO
from pruning.dynamic.planner import Planner
from pruning.dynamic.router_file import load_router
from tests.pruning.dynamic.tiny_router import expect, plain_checkpoint, routed_checkpoint  # noqa: F401
from tests.server.tiny import write

NAMED = ("light", "balanced", "strong")


@pytest.fixture(scope="module", name="directory")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tiny") / "tiny", layers=6)


# ---- policies


def test_every_policy_keeps_to_every_budget(directory):
    checkpoint = load(directory)
    found = [one for one in routing_sweep.settings(checkpoint, None) if one.budget.endswith("FLOPs")]
    assert {one.policy for one in found} == set(routing_sweep.POLICIES) - set(routing_sweep.ROUTED)
    scene = draw("test", 1)
    image = routing_sweep.encode(checkpoint, scene)
    prompts, answers = routing_sweep.questions(checkpoint, scene, image.tokens[0])
    for setting in found:
        right, spent = routing_sweep.ask(setting, checkpoint, image, prompts, answers, [], seed=0)
        assert len(right) == len(spent) == len(scene.questions)
        limit = float(setting.budget.split("%")[0]) / 100 + 0.03  # a longer question than the typical one
        assert max(flops for flops, _ in spent) <= limit, setting


def test_a_router_spends_less_where_less_is_to_be_spent(routed):
    checkpoint = load(routed)
    router = load_router(checkpoint)
    expect(router, torch.linspace(0.3, 0.95, router.config.operating_points).tolist())
    image = routing_sweep.encode(checkpoint, draw("test", 1))
    prompts, answers = routing_sweep.questions(checkpoint, draw("test", 1), image.tokens[0])
    routings = [routing_sweep.score(router, checkpoint.model, prompt, image) for prompt in prompts]
    for policy in routing_sweep.ROUTED:
        found = [one for one in routing_sweep.settings(checkpoint, router) if one.policy == policy and one.budget.endswith("FLOPs")]
        asked = [routing_sweep.ask(setting, checkpoint, image, prompts, answers, routings, seed=0) for setting in found]
        spent = [max(ratios) for _, ratios in asked]
        assert len(found) == 4
        assert spent == sorted(spent, reverse=True)


def test_only_where_layers_are_asked_for_are_any_frozen(routed, monkeypatch):
    checkpoint = load(routed)
    router = load_router(checkpoint)
    routes = []
    real = routing_sweep.make_route
    monkeypatch.setattr(routing_sweep, "make_route", lambda *given: routes.append(made := real(*given)) or made)
    frozen = {}
    place = next(i for i, one in enumerate(Planner(checkpoint).menu[AUTO].operating_points) if one.frozen_layers)
    expect(router, [0.99 if i == place else 0.01 for i in range(router.config.operating_points)])
    for policy in ("router", LAYERS, SHUFFLED):
        setting = next(one for one in routing_sweep.settings(checkpoint, router) if one.policy == policy)
        routes.clear()
        (found,) = routing_sweep.run_policy([replace(setting, cost_weight=0.5)], checkpoint, router, 1, "validation", 0)
        assert found["questions"] == len(routes) == len(draw("validation", 0).questions)
        frozen[policy] = {len(route.frozen_layers) for route, _ in routes}
    assert frozen == {"router": {0}, LAYERS: {1}, SHUFFLED: {0}}


def test_a_budgets_cost_weight_lies_between_those_of_a_sweep():
    bought = [{"cost_weight": weight, "flops_ratio": ratio} for weight, ratio in ((0.01, 0.8), (0.1, 0.6), (1.0, 0.2))]
    assert cost_weight_for(bought, "flops_ratio", 0.6) == pytest.approx(0.1)
    assert cost_weight_for(bought, "flops_ratio", 0.4) == pytest.approx(10**-0.5)


def invoke(*given: str) -> None:
    result = CliRunner().invoke(routing_sweep.app, given)
    assert result.exit_code == 0, result.output


def test_what_is_stored_is_not_run_again(directory, tmp_path):
    runs = tmp_path / "runs.jsonl"
    for _ in range(2):
        invoke("policies", str(directory), "--runs", str(runs), "--pictures", "2", "--only", "uniform, 0.111")
    (entry,) = [json.loads(line) for line in runs.read_text().splitlines()]
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
    routing_report.main(runs, tmp_path / "page.md", tmp_path / "none.jsonl")
    page = (tmp_path / "page.md").read_text()
    assert "| router | 80.5% ± 6.4 (89.4%; 46%) |" in page
    assert "| random | 45.0% (50.0%; 45%) |" in page
    assert (tmp_path / "page_embedded.png").stat().st_size > 1000


# ---- levels


@pytest.fixture(scope="module", name="found")
def found_levels(routed):
    return routing_sweep.run_levels(load(routed), pictures=2, split="validation")


def test_off_agrees_with_itself_first_and_following_up(found):
    for place in ("first", "follow_up"):
        off = found["levels"][place]["off"]
        assert (off["agreement"], off["agreement_interval"], off["flops_ratio"]) == (1.0, [1.0, 1.0], 1.0)
        assert set(found["levels"][place]) >= {"off", AUTO, *NAMED}
        assert off["n"] == found["levels"][place][AUTO]["n"] > 10


@pytest.mark.parametrize("against", ["against_fixed", "against_levels"])
def test_auto_is_held_against_the_cheapest_that_agrees_as_often(found, against):
    first = found["levels"]["first"]
    others = {name for name in first if name != AUTO and (name == "off" or (name in NAMED) == (against == "against_levels"))}
    equal = {name: first[name]["flops_ratio"] for name in others if first[name]["agreement"] >= first[AUTO]["agreement"]}
    assert found[against]["flops_ratio"] == min(equal.values())
    assert found[against]["level"] in equal
    assert found[against]["saved"] == pytest.approx(1 - first[AUTO]["flops_ratio"] / min(equal.values()), abs=2e-4)


def test_following_up_auto_is_held_against_itself_first(found):
    lost = {
        place: found["levels"][place]["off"]["agreement"] - found["levels"][place][AUTO]["agreement"]
        for place in ("first", "follow_up")
    }
    assert found["follow_up_against_first"]["agreement"] == pytest.approx(lost["first"] - lost["follow_up"], abs=2e-4)
    low, high = found["follow_up_against_first"]["agreement_interval"]
    assert low <= found["follow_up_against_first"]["agreement"] <= high


def test_a_level_is_asked_about_what_its_tower_sees(routed, monkeypatch):
    checkpoint = load(routed)
    merging = replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"patch_ratio": {"strong": 0.25}}))
    seen, plan, encode = {}, Planner.plan, routing_sweep.encode

    def recorded(planner, level, reason, prompt, images, **options):
        seen[level] = images[0].tokens
        return plan(planner, level, reason, prompt, images, **options)

    monkeypatch.setattr(Planner, "plan", recorded)
    routing_sweep.run_levels(merging, pictures=1, split="validation")
    scene = draw("validation", 0)
    for level in seen:
        assert torch.equal(seen[level], encode(checkpoint, scene, 0.25 if level == "strong" else 1.0).tokens)


def test_levels_need_a_router(directory, tmp_path):
    result = CliRunner().invoke(routing_sweep.app, ["levels", str(directory), "--runs", str(tmp_path / "runs.jsonl")])
    assert result.exit_code == 2
    assert "has no router" in result.output


def test_the_page_shows_the_levels(found, tmp_path):
    common = {"checkpoint": "embedded", "split": "test", "pictures": 2, "questions": 18, "seed": 0}
    off = common | {"policy": "off", "budget": "off", "keep": 144, "skip": 0, "accuracy": 0.9, "flops_ratio": 1.0}
    (tmp_path / "runs.jsonl").write_text(json.dumps(off) + "\n")
    (tmp_path / "levels.jsonl").write_text(json.dumps(common | found) + "\n")
    routing_report.main(tmp_path / "runs.jsonl", tmp_path / "page.md", tmp_path / "levels.jsonl")
    page = (tmp_path / "page.md").read_text()
    assert "| off | 100.0% (100.0–100.0) |" in page
    auto = found["levels"]["first"][AUTO]
    assert f"| 0 | {auto['agreement']:.2%} | {auto['flops_ratio']:.1%} | {found['against_fixed']['level']} |" in page
