"""A user's own questions: how often a level, or a pruned checkpoint, answers as the dense model does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from evals.exam import normalise
from evals.official.task import DataError, Figures, Question, Task, at, read_jsonl


def read_own(path: Path, split: str | None = None) -> list[Question]:
    """The lines of docs/pruning.md, each turn a question of its own; an answer is not needed. `entry` is the answer."""
    if split:
        raise DataError("a file of your own has no --split")
    return list(_read(path))


def _read(path: Path) -> Iterator[Question]:
    for where, entry in read_jsonl(path):
        with at(where):
            picture = path.parent / entry["image"]
            if "conversations" in entry:
                values = [turn["value"] for turn in entry["conversations"]]
                turns = [(text, values[2 * n + 1] if 2 * n + 1 < len(values) else None) for n, text in enumerate(values[::2])]
            else:
                turns = [(entry["question"], entry.get("answer"))]
            if not all(isinstance(text, str) and isinstance(answer, str | None) for text, answer in turns):
                raise DataError(f"{where}: questions and answers must be strings")
            for number, (text, answer) in enumerate(turns):
                name = f"{where.rpartition(' ')[2]}.{number}"
                yield Question(name, text.replace("<image>", "").strip(), picture, where, entry=answer)


def with_dense(questions: Sequence[Question], texts: Sequence[str | None]) -> list[Question]:
    """The same questions, whose `reference` is what the dense model said, nothing where it refused."""
    return [replace(question, reference=text or "") for question, text in zip(questions, texts, strict=True)]


def _same(question: Question, answer: str) -> float:
    return float(normalise(answer) == normalise(question.reference))


def _figures(questions: Sequence[Question], answers: Sequence[str | None]) -> Figures:
    """Where the file has all answers, the share that is right, by exact match."""
    right = [question.entry for question in questions]
    if any(answer is None for answer in right):
        return {}
    dense = [question.reference for question in questions]
    return {
        name: fmean(text is not None and normalise(text) == normalise(answer) for text, answer in zip(texts, right, strict=True))
        for name, texts in (("right", answers), ("right, dense", dense))
    }


OWN = Task(read_own, _same, measure="agreement with dense", figures=_figures)
