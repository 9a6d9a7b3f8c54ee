"""A run's folder: what ran, and each answer as it came, so that a run that was stopped goes on.

`answers.jsonl` is LLaVA's own answer format; what our receipt says is in its `metadata`. `run.json` says what ran.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from evals.official.ask import Answer
from evals.official.task import DataError, Question, read_json
from evals.runs import Line, stored
from models.files import write_whole


def open_folder(folder: Path, about: dict[str, Any]) -> None:
    """Make the folder of a run, or see that it holds this very run. Raises DataError for another's."""
    path = folder / "run.json"
    if path.exists():
        before = read_json(path)
        if different := [name for name in about.keys() | before.keys() if about.get(name) != before.get(name)]:
            name = sorted(different)[0]
            raise DataError(
                f"{folder} holds a run whose {name} is {before.get(name)!r}, not {about.get(name)!r}; "
                "name another --out, or delete it"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(about, indent=2) + "\n").encode())


def line(question: Question, answer: Answer, model: str, seconds: float) -> Line:
    """`seconds` passed since the answer before: those of all lines add up to the time of the run, however often it was stopped."""
    metadata = answer.receipt | {"seconds": round(seconds, 4)} | ({"refused": answer.refused} if answer.refused else {})
    return {
        "question_id": question.id, "prompt": question.text, "text": answer.text,
        "answer_id": sha256(f"{question.key}".encode()).hexdigest()[:22], "model_id": model, "metadata": metadata,
    }  # fmt: skip


def by_question(path: Path, questions: Sequence[Question]) -> list[Line | None]:
    """What is stored for each question."""
    found = {(one["question_id"], one["prompt"]): one for one in stored(path)}
    return [found.get(question.key) for question in questions]
