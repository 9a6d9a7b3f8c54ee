"""Yes or no: POPE and MME."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from evals.official.task import SHORT, DataError, Figures, Files, Question, Task, at, read_jsonl, read_text

# ---- POPE


def read_pope(data: Path, split: str | None) -> list[Question]:
    """All of `coco_pope_*.json`, or the one that `split` names; pictures in val2014."""
    folder = data / "coco" if (data / "coco").is_dir() else data
    name = f"coco_pope_{split or '*'}.json"
    files = sorted(folder.glob(name))
    if not files:
        raise DataError(f"{folder / name} is missing; docs/evaluation.md lists the files of each task")
    return [_pope(data, path.stem.removeprefix("coco_pope_"), *line) for path in files for line in read_jsonl(path)]


def _pope(data: Path, category: str, where: str, entry: dict[str, Any]) -> Question:
    with at(where):
        if entry["label"] not in ("yes", "no"):
            raise DataError(f"{where}: the label is {entry['label']!r}, not yes or no")
        text, picture = entry["text"] + SHORT, data / "val2014" / entry["image"]
        return Question(f"{category}/{entry['question_id']}", text, picture, where, entry["label"], (category,))


def said(answer: str) -> str:
    """POPE's reading: the first sentence says no if it holds the word No, no or not."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & {*words} else "yes"


def _pope_figures(questions: Sequence[Question], answers: Sequence[str | None]) -> Figures:
    pairs: dict[str, list[tuple[str | None, str]]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        pairs[question.groups[0]].append((None if answer is None else said(answer), question.reference))
    found: Figures = {}
    for category, each in pairs.items():
        yes, right = sum(given == "yes" for given, _ in each), sum(given == label == "yes" for given, label in each)
        real = sum(label == "yes" for _, label in each)
        precision, recall = right / max(1, yes), right / max(1, real)
        found |= {
            f"{category}: precision": precision, f"{category}: recall": recall,
            f"{category}: F1": 2 * precision * recall / ((precision + recall) or 1), f"{category}: yes ratio": yes / len(each),
        }  # fmt: skip
    found["F1, mean"] = fmean([value for name, value in found.items() if name.endswith(": F1")])
    return found


# ---- MME

_PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_ASKED = "Please answer yes or no."


def read_mme(data: Path, split: str | None) -> list[Question]:
    """All categories, or the one that `split` names."""
    inner = data / "MME_Benchmark_release_version"
    root = inner if inner.is_dir() else data
    folders = [root / name for name in (*_PERCEPTION, *_COGNITION) if split in (None, name) and (root / name).is_dir()]
    if not folders:
        raise DataError(f"{root}: no folder of MME's, such as {split or _PERCEPTION[0]}")
    return [question for folder in folders for path in _texts(folder) for question in _mme(root, folder, path)]


def _texts(folder: Path) -> list[Path]:
    inner = folder / "questions_answers_YN"
    return sorted((inner if inner.is_dir() else folder).glob("*.txt"))


def _mme(root: Path, folder: Path, path: Path) -> list[Question]:
    """A picture's questions, two in the official files: a line each, with its answer behind a tab."""
    pictures = folder / "images" if (folder / "images").is_dir() else folder
    picture = next((file for kind in (".jpg", ".png", ".jpeg") if (file := pictures / f"{path.stem}{kind}").is_file()), None)
    if picture is None:
        raise DataError(f"{path}, line 1: the picture {pictures / path.stem}.jpg or .png is missing")
    found = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number}"
        text, _, label = line.strip().partition("\t")
        if label not in ("Yes", "No"):
            raise DataError(f"{where}: no question with Yes or No behind a tab")
        prompt = text.replace(_ASKED, "").strip() + SHORT
        found.append(Question(picture.relative_to(root).as_posix(), prompt, picture, where, label, (folder.name,), text))
    return found


def meant(answer: str) -> str:
    """MME's reading: yes or no within the first four characters."""
    start = answer.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def _score_mme(question: Question, answer: str) -> float:
    return float(meant(answer) == question.reference.lower())


def _mme_figures(questions: Sequence[Question], answers: Sequence[str | None]) -> Figures:
    """Of each category, the accuracy and the share of pictures with all answers right, both in percent and added up."""
    right: dict[str, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for question, answer in zip(questions, answers, strict=True):
        right[question.groups[0]][question.id].append(_score_mme(question, answer or ""))
    scores = {}
    for category, pictures in right.items():
        singly, whole = [one for each in pictures.values() for one in each], [min(each) for each in pictures.values()]
        scores[category] = 100 * (fmean(singly) + fmean(whole))
    kinds = {"perception": _PERCEPTION, "cognition": _COGNITION}
    return {kind: sum(scores.get(name, 0.0) for name in names) for kind, names in kinds.items()} | scores


def _mme_files(questions: Sequence[Question], answers: Sequence[str]) -> Files:
    """What the official `calculation.py` reads: a file for each category."""
    lines: dict[str, list[str]] = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        cells = (f"{Path(str(question.id)).stem}.txt", question.entry, question.reference, " ".join(answer.split()))
        lines[question.groups[0]].append("\t".join(cells) + "\n")
    return {f"mme/{category}.txt": "".join(each).encode() for category, each in lines.items()}


POPE = Task(read_pope, lambda question, answer: float(said(answer) == question.reference), figures=_pope_figures)
MME = Task(read_mme, _score_mme, figures=_mme_figures, files=_mme_files)
