"""Run a task: ask what is not answered yet, let the judge review, score, compare, and write what the official scripts read."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from evals.official import answers
from evals.official.ask import Ask
from evals.official.judge import Judge, JudgeError
from evals.official.task import DataError, Question, Task, read_json
from evals.runs import Line, rewrite, store, stored
from evals.statistics import difference_interval, interval
from models.files import write_whole
from pruning.progress import progress_bar

Document = dict[str, Any]
REFUSED = {"score": 0.0}
"""Whatever a judge makes of no answer."""


@dataclass(frozen=True)
class Measured:
    """A finished run: what to report of it, and of each question its score (None before a judge has been), text (None where it was
    refused) and picture."""

    document: Document
    questions: list[Question]
    texts: list[str | None]
    scores: list[float] | None


def run(
    task: Task, questions: list[Question], data: Path, ask: Ask, about: Document, folder: Path, judge: Judge | None,
    console: Console,
) -> Measured:  # fmt: skip
    """Everything for one level. `about` says what runs: task, model, level and whatever else makes it another run.

    Raises DataError for data that cannot be used, ValueError for questions that were not answered and a judge that fails. What was
    answered and reviewed until then is kept in `folder`.
    """
    answers.open_folder(folder, about)
    path = folder / "answers.jsonl"
    _ask_missing(questions, ask, task.max_tokens, about, path, console)
    lines = [one for one in answers.by_question(path, questions) if one]
    rewrite(path, lines + _others(path, questions))
    texts = list(map(_text, lines))
    reviews = _review(task, judge, data, questions, texts, folder / "reviews.jsonl", console)
    scores = _scores(task, questions, texts, reviews)
    document = about | summarise(task, questions, texts, scores, lines)
    if reviews:
        document["figures"] = _rounded(task.review_figures(questions, reviews)) | {"judge": reviews[0]["model"]}
    for name, content in task.files(questions, [text or "" for text in texts]).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, content)
    write_whole(folder / "scores.json", (json.dumps(document, indent=2) + "\n").encode())
    return Measured(document, questions, texts, scores)


def _text(line: Line) -> str | None:
    return None if "refused" in line["metadata"] else line["text"]


def _others(path: Path, questions: Sequence[Question]) -> list[Line]:
    """Answers to questions that this run does not ask, as those of a larger limit."""
    asked = {question.key for question in questions}
    return [one for one in stored(path) if (one["question_id"], one["prompt"]) not in asked]


def _ask_missing(questions: Sequence[Question], ask: Ask, max_tokens: int, about: Document, path: Path, console: Console) -> None:
    known = answers.by_question(path, questions)
    missing = [question for question, one in zip(questions, known, strict=True) if one is None]
    failed: list[tuple[Question, str]] = []
    with progress_bar(console) as progress:
        done = len(questions) - len(missing)
        bar = progress.add_task(f"{about['task']} at {about['level']}", total=len(questions), completed=done)
        before = time.monotonic()
        for question, answer in ask(missing, max_tokens):
            now = time.monotonic()
            if answer.failed:
                failed.append((question, answer.failed))
            else:
                store(path, [answers.line(question, answer, about["model"], now - before)])
            before = now
            progress.advance(bar)
    if failed:
        question, reason = failed[0]
        raise ValueError(
            f"{len(failed)} of {len(questions)} questions were not answered, first {question.where}: {reason}; the others are "
            "kept, run the same command to ask again"
        )


def _review(
    task: Task, judge: Judge | None, data: Path, questions: Sequence[Question], texts: Sequence[str | None], path: Path,
    console: Console,
) -> list[dict[str, Any]]:  # fmt: skip
    """The judge's review of each answer; those stored are kept if they are of this judge. Empty without a judge."""
    if task.review is None or judge is None:
        return []
    known = {one["key"]: one for one in stored(path) if one["model"] == judge.model}
    found: list[dict[str, Any]] = []
    with progress_bar(console) as progress:
        bar = progress.add_task(f"judged by {judge.model}", total=len(questions))
        for question, text in zip(questions, texts, strict=True):
            key = _key(question, text)
            if key not in known:
                try:
                    review = task.review(judge, data, question, text or "") | {"key": key} | (REFUSED if text is None else {})
                except JudgeError as error:
                    raise ValueError(
                        f"{question.where}: the judge {judge.model} at {judge.url} failed: {error}; {len(found)} of "
                        f"{len(questions)} answers are judged and kept, run the same command to go on"
                    ) from error
                store(path, [review])
                known[key] = review
            found.append(known[key])
            progress.advance(bar)
    return found


def _key(question: Question, text: str | None) -> str:
    """A review is of these words: another answer is reviewed anew."""
    return json.dumps([question.id, text or ""])


def _scores(
    task: Task, questions: Sequence[Question], texts: Sequence[str | None], reviews: Sequence[dict[str, Any]]
) -> list[float] | None:
    """None where the file withholds the answers or no judge was asked. What was refused is wrong."""
    if reviews:
        return [float(review["score"]) for review in reviews]
    if task.score is None or any(question.reference is None for question in questions):
        return None
    return [0.0 if text is None else task.score(question, text) for question, text in zip(questions, texts, strict=True)]


def summarise(
    task: Task, questions: Sequence[Question], texts: Sequence[str | None], scores: list[float] | None,
    lines: Sequence[Line],
) -> Document:  # fmt: skip
    """The mean score over all and by group, the official script's figures, and what was run for it."""
    groups: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        for group in question.groups:
            groups[group].append(number)
    pictures = [question.picture for question in questions]
    found: Document = {"n": len(questions), "measure": task.measure}
    if scores is not None:
        found |= cell(scores, pictures)
        found["groups"] = {
            name: cell([scores[n] for n in chosen], [pictures[n] for n in chosen]) | {"n": len(chosen)}
            for name, chosen in sorted(groups.items())
        }
        found["figures"] = _rounded(task.figures(questions, texts)) if task.score else {}
    metadata = [line["metadata"] for line in lines]
    return found | {
        "refused": sum("refused" in one for one in metadata),
        **{name: _mean(metadata, name) for name in ("visual_tokens", "visual_tokens_total", "layers", "flops_ratio")},
        "seconds_per_question": round(sum(one["seconds"] for one in metadata) / max(1, len(metadata)), 4),
    }


def cell(scores: Sequence[float], pictures: Sequence[Hashable]) -> Document:
    """A mean score with its 95 % interval, in which questions about one picture vary together."""
    return {"accuracy": round(fmean(scores), 4) if scores else 0.0, "interval": interval(scores, pictures)}


def _mean(metadata: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [one[name] for one in metadata if name in one]
    return round(fmean(values), 4) if values else None


def _rounded(figures: dict[str, float]) -> dict[str, Any]:
    return {name: round(value, 4) for name, value in figures.items()}


# ---- two runs, question by question


def compare(ours: Measured, theirs: Measured) -> Document:
    """What changed against another run on the questions that both have: same words, better, worse, and the mean difference."""
    at = {question.key: number for number, question in enumerate(theirs.questions)}
    pairs = [(number, at[question.key]) for number, question in enumerate(ours.questions) if question.key in at]
    if not pairs:
        raise DataError("the two runs have no question in common")
    found: Document = {
        "against": f"{theirs.document['model']} at {theirs.document['level']}", "n": len(pairs),
        "same_answer": round(fmean(ours.texts[a] == theirs.texts[b] is not None for a, b in pairs), 4),
    }  # fmt: skip
    if ours.scores is None or theirs.scores is None:
        return found
    gains = [ours.scores[a] - theirs.scores[b] for a, b in pairs]
    changed = [
        {"question_id": question.id, "prompt": question.text, "ours": ours.texts[a], "theirs": theirs.texts[b], "gain": gain}
        for (a, b), gain in zip(pairs, gains, strict=True)
        if gain and (question := ours.questions[a])
    ]
    return found | {
        "better": sum(gain > 0 for gain in gains), "worse": sum(gain < 0 for gain in gains), "difference": round(fmean(gains), 4),
        "interval": difference_interval(gains, [ours.questions[a].picture for a, _ in pairs]), "changed": changed,
    }  # fmt: skip


def reopen(task: Task, folder: Path, questions: Sequence[Question]) -> Measured:
    """Another run on the same questions, from its folder. Raises DataError where there is none."""
    if not (folder / "run.json").exists():
        raise DataError(f"{folder} is no run; name a folder that `espalier eval --task` wrote")
    about = read_json(folder / "run.json")
    known = answers.by_question(folder / "answers.jsonl", questions)
    shared = [question for question, line in zip(questions, known, strict=True) if line]
    texts = [_text(line) for line in known if line]
    reviews = {one["key"]: one for one in stored(folder / "reviews.jsonl")}
    found = [reviews.get(_key(question, text)) for question, text in zip(shared, texts, strict=True)]
    return Measured(about, shared, texts, _scores(task, shared, texts, [one for one in found if one] if all(found) else []))


# ---- what people see


def show(measured: Measured, console: Console) -> None:
    document = measured.document
    title = f"{document['task']}: {document['model']} at level {document['level']}"
    table = Table("questions", "n", document["measure"], title=title)
    if "accuracy" in document:
        for name, one in document["groups"].items():
            table.add_row(name, str(one["n"]), share(one))
        table.add_section()
        table.add_row("all", str(document["n"]), share(document))
    else:
        table.add_row("all", str(document["n"]), "not scored here: see the files")
    for name, value in document.get("figures", {}).items():
        table.add_row(name, "", f"{value:,.4g}" if isinstance(value, float) else str(value))
    console.print(table)
    if document["flops_ratio"] is not None:
        tokens = f"{document['visual_tokens']:.0f} of {document['visual_tokens_total']:.0f} visual tokens"
        cost = f"{document['flops_ratio']:.1%} of the FLOPs, {document['seconds_per_question']:.3g} s a question"
        console.print(f"mean: {tokens}, {document['layers']:.1f} layers, {cost}", soft_wrap=True)
    if document["refused"]:
        console.print(f"{document['refused']} questions do not fit the context and count as wrong")


def show_change(change: Document, console: Console) -> None:
    same = f"{change['n']} questions: {change['same_answer']:.1%} of the answers are the same"
    console.print(f"against {change['against']}, {same}", soft_wrap=True)
    if "difference" not in change:
        return
    low, high = change["interval"]
    console.print(
        f"  better {change['better']}, worse {change['worse']}: {100 * change['difference']:+.2f} points "
        f"(95 %: {100 * low:+.2f} to {100 * high:+.2f})"
    )
    for one in change["changed"][:5]:
        first = one["prompt"].split("\n")[0]
        said = f"{one['ours']!r}, before {one['theirs']!r}"
        console.print(f"  {one['question_id']}: {first} — {said}", highlight=False, markup=False, soft_wrap=True)


def share(cell: Document) -> str:
    low, high = cell["interval"]
    return f"{cell['accuracy']:.1%} ({low:.1%} to {high:.1%})"
