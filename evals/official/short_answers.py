"""Questions with answers of a word or two: VQAv2, OK-VQA, TextVQA, VizWiz and GQA."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from evals.official.task import SHORT, DataError, Files, Question, Task, at, entries, mapped, read_json, read_jsonl
from evals.official.vqa_accuracy import agreement, normalise, prepare, vqa_accuracy

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def _score_vqa(question: Question, answer: str) -> float:
    return vqa_accuracy(prepare(answer), question.reference)


# ---- VQAv2 and OK-VQA: one format


def read_vqav2(data: Path, split: str | None) -> list[Question]:
    split = split or "val"
    questions = data / f"v2_OpenEnded_mscoco_{_coco(split)}_questions.json"
    return list(_vqa(data, questions, data / f"v2_mscoco_{_coco(split)}_annotations.json", answered=split in ("train", "val")))


def read_okvqa(data: Path, split: str | None) -> list[Question]:
    year = _coco(split or "val")
    return list(_vqa(data, data / f"OpenEnded_mscoco_{year}_questions.json", data / f"mscoco_{year}_annotations.json", True))


def _coco(split: str) -> str:
    years = {"train": "train2014", "val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}
    if split not in years:
        raise DataError(f"split {split!r} is not one of {', '.join(years)}")
    return years[split]


def _vqa(data: Path, questions: Path, annotations: Path, answered: bool) -> Iterator[Question]:
    known = _annotations(annotations) if answered else {}
    with at(str(questions)):
        folder = (document := read_json(questions))["data_subtype"].replace("-dev", "")
        asked = document["questions"]
    for where, entry in entries(questions, asked, "question_id"):
        with at(where):
            number, picture = entry["question_id"], f"COCO_{folder}_{entry['image_id']:012d}.jpg"
            if answered and number not in known:
                raise DataError(f"{where}: {annotations} has no answers to it")
            answers, groups = known.get(number, (None, ()))
            yield Question(number, entry["question"] + SHORT, data / folder / picture, where, answers, groups)


def _annotations(path: Path) -> dict[int, tuple[list[str], tuple[str, ...]]]:
    """By question: what ten people answered, and what kind of answer and question it is."""
    with at(str(path)):
        listed, names = (document := read_json(path))["annotations"], document.get("question_types", {})
    found: dict[int, tuple[list[str], tuple[str, ...]]] = {}
    for where, entry in entries(path, listed, "question_id"):
        with at(where):
            answers = [answer["answer"] for answer in entry["answers"]]
            kind = names.get(entry["question_type"], entry["question_type"])
            found[entry["question_id"]] = (answers, (f"answer: {entry['answer_type']}", f"question: {kind}"))
    return found


def _vqa_files(questions: Sequence[Question], answers: Sequence[str]) -> Files:
    """The evaluation server's, answers prepared as LLaVA prepares them."""
    listed = [{"question_id": one.id, "answer": prepare(answer)} for one, answer in zip(questions, answers, strict=True)]
    return {"upload.json": json.dumps(listed).encode()}


# ---- TextVQA


def read_textvqa(data: Path, split: str | None) -> list[Question]:
    """Prompts are those of LLaVA's file where it is there, since they hold what an OCR read; else the questions alone."""
    if split not in (None, "val"):
        raise DataError(f"split {split!r} is not val, the one with answers")
    annotations = data / "TextVQA_0.5.1_val.json"
    with at(str(annotations)):
        listed = read_json(annotations)["data"]
    prompts = _textvqa_prompts(data / "llava_textvqa_val_v051_ocr.jsonl")
    return [_textvqa(data, where, entry, prompts) for where, entry in entries(annotations, listed, "question_id")]


def _textvqa(data: Path, where: str, entry: Any, prompts: dict[tuple[str, str], str]) -> Question:
    with at(where):
        picture, text, answers = entry["image_id"], entry["question"], entry["answers"]
        if len(answers) != 10:
            raise DataError(f"{where}: {len(answers)} answers; the accuracy is defined for ten")
        prompt = prompts.get((picture, text.lower()), text + SHORT)
        answers = [prepare(answer) for answer in answers]
        return Question(picture, prompt, data / "train_images" / f"{picture}.jpg", where, answers)


def _textvqa_prompts(path: Path) -> dict[tuple[str, str], str]:
    if not path.exists():
        return {}
    found = {}
    for where, entry in read_jsonl(path):
        with at(where):
            found[entry["question_id"], entry["text"].split("\n")[0].lower()] = entry["text"]
    return found


# ---- VizWiz


def read_vizwiz(data: Path, split: str | None) -> list[Question]:
    split = split or "val"
    path = data / f"{split}.json"
    listed = entries(path, read_json(path), "image")
    return [_vizwiz(data / split, number, where, entry) for number, (where, entry) in enumerate(listed)]


def _vizwiz(folder: Path, number: int, where: str, entry: Any) -> Question:
    with at(where):
        answers = [answer["answer"] for answer in entry["answers"]] if "answers" in entry else None
        groups = (f"answer: {entry['answer_type']}",) if "answer_type" in entry else ()
        return Question(number, entry["question"] + UNANSWERABLE + SHORT, folder / entry["image"], where, answers, groups)


def _score_vizwiz(question: Question, answer: str) -> float:
    """As VizWiz' own code, which takes people's answers as they are."""
    return agreement(normalise(prepare(answer)), question.reference)


def _vizwiz_files(questions: Sequence[Question], answers: Sequence[str]) -> Files:
    listed = [
        {"image": Path(str(one.image)).name, "answer": prepare(answer)} for one, answer in zip(questions, answers, strict=True)
    ]
    return {"upload.json": json.dumps(listed).encode()}


# ---- GQA


def read_gqa(data: Path, split: str | None) -> list[Question]:
    path = data / f"{split or 'testdev_balanced'}_questions.json"
    found = []
    for key, where, entry in mapped(path):
        with at(where):
            if not entry.get("isBalanced", True):
                continue
            groups: tuple[str, ...] = ()
            if "types" in entry:
                structural, semantic = entry["types"]["structural"], entry["types"]["semantic"]
                groups = ("open" if structural == "query" else "binary", f"structural: {structural}", f"semantic: {semantic}")
            picture = data / "images" / f"{entry['imageId']}.jpg"
            found.append(Question(key, entry["question"] + SHORT, picture, where, entry.get("answer"), groups))
    return found


def _gqa_prediction(answer: str) -> str:
    return answer.rstrip(".").lower()


def _gqa_files(questions: Sequence[Question], answers: Sequence[str]) -> Files:
    listed = [
        {"questionId": one.id, "prediction": _gqa_prediction(answer)} for one, answer in zip(questions, answers, strict=True)
    ]
    return {"predictions.json": json.dumps(listed).encode()}


VQAV2 = Task(read_vqav2, _score_vqa, measure="VQA accuracy", files=_vqa_files)
OKVQA = Task(read_okvqa, _score_vqa, measure="VQA accuracy", files=_vqa_files)
TEXTVQA = Task(read_textvqa, lambda question, answer: agreement(prepare(answer), question.reference), measure="VQA accuracy")
VIZWIZ = Task(read_vizwiz, _score_vizwiz, measure="VQA accuracy", files=_vizwiz_files)
GQA = Task(read_gqa, lambda question, answer: float(_gqa_prediction(answer) == question.reference), files=_gqa_files)
