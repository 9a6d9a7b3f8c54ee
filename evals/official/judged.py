"""Free answers that a judge scores: MM-Vet and LLaVA-Bench (In-the-Wild).

Answers are written as the official judging scripts read them. With a judge of one's own the same questions are put to it; their
wording is read from the official files, which are put beside the data: `mm-vet_evaluator.py`, `rule.json`.
"""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.official.judge import Judge
from evals.official.task import LONG_TOKENS, DataError, Figures, Files, Question, Task, at, mapped, read_json, read_jsonl, read_text

# ---- MM-Vet


def read_mmvet(data: Path, split: str | None) -> list[Question]:
    found = []
    for key, where, entry in mapped(data / "mm-vet.json"):
        with at(where):
            picture, groups = data / "images" / entry["imagename"], tuple(sorted(set(entry["capability"])))
            found.append(Question(key, entry["question"], picture, where, entry["answer"], groups))
    return found


def _mmvet_files(questions: Sequence[Question], answers: Sequence[str]) -> Files:
    return {"mm-vet.json": json.dumps({one.id: answer for one, answer in zip(questions, answers, strict=True)}, indent=2).encode()}


@cache
def mmvet_prompt(data: Path) -> str:
    """The judge's instructions and examples: the string `prompt` of the official script, which is read and not run."""
    path = data / "mm-vet_evaluator.py"
    if not path.exists():
        raise DataError(f"{path} is missing: --judge takes its prompt from this script of github.com/yuweihao/MM-Vet")
    try:
        tree = ast.parse(read_text(path))
    except SyntaxError as error:
        raise DataError(f"{path}, line {error.lineno}: {error.msg}") from error
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["prompt"]:
            with at(f"{path}, line {node.lineno}"):
                return str(ast.literal_eval(node.value))
    raise DataError(f"{path}: no prompt = in it; is this the official script?")


AGAIN = "\nPredict the correctness of the answer (digit): "
"""What the official script adds when it asks again."""
RETRIES = 4


def _review_mmvet(judge: Judge, data: Path, question: Question, answer: str) -> dict[str, Any]:
    """A number from 0 to 1 that the judge completes a table row with. As in the official script, it is asked again for what is no
    such number, warmer each time, and gives 0 in the end."""
    right = question.reference.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    asked = mmvet_prompt(data) + "\n" + " | ".join([question.text, right, answer, ""])
    content = ""
    for attempt in range(1 + RETRIES):
        content = judge.ask([{"role": "user", "content": asked + (AGAIN if attempt else "")}], 0.5 * max(0, attempt - 1), 3)
        score = _number(content.split(" ")[0].strip())
        if score is not None and 0 <= score <= 1:
            return {"question_id": question.id, "model": judge.model, "content": content, "score": score}
    return {"question_id": question.id, "model": judge.model, "content": content, "score": 0.0, "unreadable": True}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _mmvet_figures(questions: Sequence[Question], reviews: Sequence[dict[str, Any]]) -> Figures:
    return {"total": 100 * fmean(review["score"] for review in reviews)} | _unreadable(reviews)


# ---- LLaVA-Bench

# The official script's system message.
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."


def read_llava_bench(data: Path, split: str | None) -> list[Question]:
    found = []
    for where, entry in read_jsonl(data / "questions.jsonl"):
        with at(where):
            picture, kind = data / "images" / entry["image"], entry["category"]
            found.append(Question(entry["question_id"], entry["text"], picture, where, None, (kind,), entry["image"]))
    return found


@cache
def _references(data: Path) -> tuple[dict[str, str], dict[str | int, dict[str, Any]], dict[str, Any]]:
    """Captions by picture, GPT-4's answers by question, and the judge's instructions by category."""
    captions, answers = {}, {}
    for where, entry in read_jsonl(data / "context.jsonl"):
        with at(where):
            caption = entry["caption"]
            captions[entry["image"]] = "\n".join(caption) if isinstance(caption, list) else caption
    for where, entry in read_jsonl(data / "answers_gpt4.jsonl"):
        with at(where):
            answers[entry["question_id"]] = entry
    rules = data / "rule.json"
    if not rules.exists():
        raise DataError(f"{rules} is missing: --judge takes its prompt from llava/eval/table/ of github.com/haotian-liu/LLaVA")
    return captions, answers, read_json(rules)


def _review_llava_bench(judge: Judge, data: Path, question: Question, answer: str) -> dict[str, Any]:
    captions, answers, rules = _references(data)
    category = f"llava_bench_{question.groups[0]}"
    with at(f"{question.where}: its caption, answer or rule"):
        caption, other, rule = captions[question.entry], answers[question.id], rules[category]
        role, sections = rule["role"], [("Context", caption), ("Question", question.text)]
        parts = [f"[{name}]\n{text}\n\n" for name, text in sections]
        parts += [f"[{role} {n}]\n{text}\n\n[End of {role} {n}]\n\n" for n, text in ((1, other["text"]), (2, answer))]
        asked = "".join(parts) + f"[System]\n{rule['prompt']}\n\n"
    content = judge.ask([{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}], 0.2, 1024)
    pair = score_pair(content)
    return {
        "question_id": question.id, "category": category, "content": content, "tuple": pair, "score": pair[1] / 10,
        "answer1_id": other.get("answer_id", question.id), "model": judge.model, "unreadable": pair == [-1, -1],
    }  # fmt: skip


def score_pair(review: str) -> list[float]:
    """The two numbers of a review's first line; -1 for both if they are not there, which the official script averages too."""
    cells = review.split("\n")[0].replace(",", " ").split(" ")
    numbers = [_number(cell) for cell in cells]
    return [-1, -1] if len(numbers) != 2 or None in numbers else [number for number in numbers if number is not None]


def _llava_bench_figures(questions: Sequence[Question], reviews: Sequence[dict[str, Any]]) -> Figures:
    """Of each category and of all: the mean of the model's marks in percent of the mean of GPT-4's."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for review in reviews:
        pair = review["tuple"][0], 10 * review["score"]
        for kind in (review["category"].removeprefix("llava_bench_"), "all"):
            pairs[kind].append(pair)
    return {f"{kind}: relative score": _relative(each) for kind, each in pairs.items()} | _unreadable(reviews)


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    return 100 * fmean(ours for _, ours in pairs) / (fmean(theirs for theirs, _ in pairs) or 1)


def _unreadable(reviews: Sequence[dict[str, Any]]) -> Figures:
    count = sum(bool(review.get("unreadable")) for review in reviews)
    return {"unreadable reviews": float(count)} if count else {}


MMVET = Task(
    read_mmvet, None, LONG_TOKENS, "judge's score", files=_mmvet_files, review=_review_mmvet, judge_reads=mmvet_prompt,
    review_figures=_mmvet_figures,
)  # fmt: skip
LLAVA_BENCH = Task(
    read_llava_bench, None, LONG_TOKENS, "judge's marks / 10", review=_review_llava_bench, judge_reads=_references,
    review_figures=_llava_bench_figures,
)  # fmt: skip
