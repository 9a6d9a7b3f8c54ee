"""smol's sweep: its exams can be asked, and what is stored is known again."""

from __future__ import annotations

from pathlib import Path

import pytest

from evals import smol_sweep
from evals.runs import store, stored
from evals.tasks import open_task

STORED = Path(__file__).parents[2] / "docs/runs/smol.jsonl"


@pytest.mark.parametrize("one", list(smol_sweep.exams()), ids=str)
def test_every_exam_has_options_that_its_task_knows(one: smol_sweep.Exam) -> None:
    assert open_task(one.task, 1, **one.options).about["task"] == one.task


def test_every_stored_exam_is_one_of_the_sweeps() -> None:
    for document in stored(STORED):
        if document["task"] != "perplexity":
            assert sum(smol_sweep._is(document, one) for one in smol_sweep.exams()) == 1


def test_what_is_stored_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(directory: Path, task: object, level: str, *rest: object) -> dict[str, object]:
        ran.append(level)
        return {"task": "things", "split": "test", "paraphrase": "seen", "level": level, "quantization": rest[-1]}

    monkeypatch.setattr(smol_sweep.exam, "run", run)
    monkeypatch.setattr(smol_sweep, "made", lambda variant, *rest: tmp_path)
    store(tmp_path / "smol.jsonl", [{"task": "things", "split": "test", "paraphrase": "seen", "level": "light"}])
    for _ in range(2):
        smol_sweep.main(tmp_path, only="smol things test seen ", questions=1)
    assert ran == ["off", "balanced", "strong", "off", "off"]
