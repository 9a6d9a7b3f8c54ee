"""The pruning table: what one pass says is what greedy decoding says, a sweep goes on where it was, and its page is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints.shipped import SHIPPED
from checkpoints.world import draw
from evals import exact_match, pruning_report, pruning_sweep
from evals.exam import RecordedAnswer, make_request, normalise
from evals.runs import stored
from evals.statistics import half_width
from models.checkpoint import load, open_transformers
from server.engine import Engine, Limits
from tests.server.tiny import write


def test_one_pass_says_what_greedy_decoding_says() -> None:
    source = open_transformers(SHIPPED["embedded-dense"], dtype="float32")
    found = exact_match.right_by_family(source.model, source.preprocessor, 8)
    checkpoint = load(SHIPPED["embedded-dense"], dtype="float32")
    engine = Engine(checkpoint, Limits(max_running=16, max_waiting=256))
    seen: dict[str, list[list[bool]]] = {family: [] for family in found}
    for index in range(8):
        scene = draw("test", index)
        answers = [RecordedAnswer() for _ in scene.questions]
        for number, (question, answer) in enumerate(zip(scene.questions, answers, strict=True)):
            engine.submit(make_request(checkpoint.preprocessor, 100 * index + number, scene.image, question.text, "off", answer))
        while not engine.scheduler.idle:
            engine.step()
        right = [normalise(a.text) == normalise(q.answer) for a, q in zip(answers, scene.questions, strict=True)]
        seen[scene.family].append(right)
    assert found == seen


def test_the_interval_draws_pictures_not_questions() -> None:
    alike = {"shapes": [[True] * 8, [False] * 8] * 8}
    mixed = {"shapes": [[True, False] * 4] * 16}
    low, high = exact_match.summary(alike)["interval"]
    assert high - low > 0.3
    assert exact_match.summary(mixed)["interval"] == [0.5, 0.5]
    assert exact_match.summary(alike)["accuracy"] == exact_match.summary(mixed)["accuracy"] == 0.5


@pytest.fixture(scope="module", name="runs")
def stored_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweep")
    dense = write(directory / "dense")
    runs = directory / "runs" / "pruning.jsonl"
    for only in ("dense", "50% unstructured, magnitude, uniform"):
        pruning_sweep.main(runs, str(dense), pictures=4, seeds=2, only=only)
    return runs


def test_a_sweep_stores_each_run_once(runs: Path) -> None:
    entries = stored(runs)
    assert [(e["pattern"], e["seed"]) for e in entries] == [("dense", 0), ("50% unstructured", 0), ("50% unstructured", 1)]
    assert all(0 <= e["interval"][0] <= e["accuracy"] <= e["interval"][1] <= 1 for e in entries)
    before = runs.read_text()
    pruning_sweep.main(runs, str(runs.parents[1] / "dense"), pictures=4, seeds=2, only="50% unstructured, magnitude, uniform")
    assert runs.read_text() == before


def test_the_page_shows_what_is_stored(runs: Path, tmp_path: Path) -> None:
    pruning_report.main(runs, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "### 50% unstructured" in page and "| uniform |" in page
    assert (tmp_path / "page.png").exists()
    runs_without_dense = tmp_path / "some.jsonl"
    runs_without_dense.write_text(json.dumps(stored(runs)[1]) + "\n")
    with pytest.raises(Exception, match="has no run of the dense checkpoint"):
        pruning_report.main(runs_without_dense, tmp_path / "none.md")


def test_the_half_width_is_that_of_students_t() -> None:
    assert half_width([0.1, 0.2, 0.3]) == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
