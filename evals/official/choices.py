"""Multiple choice: ScienceQA and MMBench."""

from __future__ import annotations

import base64
import binascii
import csv
import re
import string
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from io import BytesIO, StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.official.task import LETTER, LONG_TOKENS, DataError, Figures, Files, Question, Task, at, mapped, read_json, read_text

# ---- ScienceQA

_OPTIONS = "ABCDE"


def read_scienceqa(data: Path, split: str | None) -> list[Question]:
    split = split or "test"
    problems = {key: (where, entry) for key, where, entry in mapped(data / "problems.json")}
    splits = read_json(data / "pid_splits.json")
    if split not in splits:
        raise DataError(f"{data / 'pid_splits.json'}: no split {split!r}; it has {', '.join(splits)}")
    if absent := [key for key in splits[split] if key not in problems]:
        raise DataError(f"{data / 'problems.json'}: no problem {absent[0]}, which pid_splits.json lists under {split}")
    return [_problem(data / "images" / split, key, *problems[key]) for key in splits[split]]


def _problem(pictures: Path, key: str, where: str, entry: Any) -> Question:
    with at(where):
        hint, choices = entry["hint"], entry["choices"]
        lines = [entry["question"], *(f"{letter}. {choice}" for letter, choice in zip(_OPTIONS, choices, strict=False))]
        text = "\n".join([f"Context: {hint}", *lines] if hint else lines) + LETTER
        picture = pictures / key / entry["image"] if entry["image"] else None
        grade = "grades 1-6" if int(entry["grade"].removeprefix("grade")) <= 6 else "grades 7-12"
        context = "with a picture" if picture else "with a text" if hint else "without context"
        right = _OPTIONS[entry["answer"]]
        return Question(key, text, picture, where, right, (entry["subject"], context, grade))


def chosen(answer: str) -> str | None:
    """The letter, by LLaVA's rule: the letter alone, "B. because", or one "The answer is B." in it."""
    if answer in [*_OPTIONS]:
        return answer
    if answer[:1] in [*_OPTIONS] and answer[1:3] == ". ":
        return answer[0]
    found = re.findall(r"The answer is ([A-Z]).", answer)
    return found[0] if len(found) == 1 else None


def _score_scienceqa(question: Question, answer: str) -> float:
    return float(chosen(answer) == question.reference)


# ---- MMBench

_LETTERS = "ABCD"
_EMPTY = {"", "nan", "none", "na", "n/a", "null"}
_CIRCLE = 1_000_000
"""A question asked again with its options rotated has the same index modulo this."""
_SUBMITTED = ("index", "question", *_LETTERS, "answer", "split")


def read_mmbench(data: Path, split: str | None) -> list[Question]:
    if not find_spec("openpyxl"):
        raise ValueError("MMBench's server takes a table that openpyxl writes; pip install openpyxl")
    found = [data / f"{split}.tsv"] if split else sorted(data.glob("*.tsv"))
    if len(found) != 1:
        names = ", ".join(path.stem for path in found)
        raise DataError(f"{data}: {'several tables, choose by --split: ' + names if found else 'no .tsv of MMBench'}")
    pictures: dict[str, bytes] = {}
    return [_row(where, row, pictures) for where, row in _table(found[0])]


def _table(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    csv.field_size_limit(2**31 - 1)  # a field holds a picture
    reader = csv.DictReader(StringIO(read_text(path), newline=""), delimiter="\t")
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}") from error
        if row is None:
            return
        yield f"{path}, line {reader.line_num}", row


def _row(where: str, row: dict[str, str], pictures: dict[str, bytes]) -> Question:
    """`pictures` are those so far, by index: a later row may name one instead of holding it."""
    with at(where):
        options: list[str] = []
        for letter in _LETTERS:
            if (row.get(letter) or "").strip().lower() in _EMPTY:
                break
            options.append(row[letter])
        if len(options) < 2:
            raise DataError(f"{where}: less than two options")
        index = int(row["index"])
        pictures[row["index"]] = picture = _picture(row["image"], pictures)
        hint = row.get("hint") or ""
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False))
        text = ("" if hint.lower() in _EMPTY else hint + "\n") + row["question"] + listed + LETTER
        groups = tuple(row[name] for name in ("l2-category", "category") if row.get(name))
        submitted = {name: row.get(name) or "" for name in _SUBMITTED}
        return Question(index, text, picture, where, row.get("answer") or None, groups, (options, submitted))


def _picture(field: str, pictures: dict[str, bytes]) -> bytes:
    if field in pictures:
        return pictures[field]
    try:
        return base64.b64decode(field, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the picture is not base64 ({error})") from error


def infer(answer: str, options: Sequence[str]) -> str | None:
    """The letter that an answer means, by the rules that VLMEvalKit scores MMBench with where it has no judge: the one letter in
    it, among its last words, or the one option whose text it holds. Much more text than the options have says nothing."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    letters = [letter for letter in _LETTERS[: len(options)] if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if len(answer) > 2 * sum(map(len, options)):
        return None
    held = [letter for letter, option in zip(_LETTERS, options, strict=False) if option.lower() in answer.lower()]
    return held[0] if len(held) == 1 else None


def _score_mmbench(question: Question, answer: str) -> float:
    return float(infer(answer, question.entry[0]) == question.reference)


def _circular(questions: Sequence[Question], answers: Sequence[str | None]) -> Figures:
    """A question counts if it is answered right in every rotation."""
    rounds: dict[int, list[float]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        rounds[int(question.id) % _CIRCLE].append(_score_mmbench(question, answer or ""))
    return {"circular accuracy": fmean([min(each) for each in rounds.values()])} if len(rounds) < len(questions) else {}


def _mmbench_files(questions: Sequence[Question], answers: Sequence[str]) -> Files:
    """The table that the evaluation server takes."""
    from openpyxl import Workbook

    book, out = Workbook(write_only=True), BytesIO()
    sheet = book.create_sheet()
    sheet.append([*_SUBMITTED[:6], "prediction", *_SUBMITTED[6:]])
    for question, answer in zip(questions, answers, strict=True):
        row = question.entry[1]
        cells = [*(row[name] for name in _SUBMITTED[:6]), answer, *(row[name] for name in _SUBMITTED[6:])]
        sheet.append([int(cells[0]), *(_printable(cell) for cell in cells[1:])])
    book.save(out)
    return {"upload.xlsx": out.getvalue()}


def _printable(text: str) -> str:
    """Excel holds no control characters."""
    return "".join(char for char in text if char in string.whitespace or char.isprintable())


SCIENCEQA = Task(read_scienceqa, _score_scienceqa, LONG_TOKENS)
MMBENCH = Task(read_mmbench, _score_mmbench, LONG_TOKENS, figures=_circular, files=_mmbench_files)
