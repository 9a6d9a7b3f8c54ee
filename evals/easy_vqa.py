"""The public test set easy-VQA (the package `easy-vqa`): shapes of 64 pixels, thirteen answers, exact match as its authors do."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from evals.exam import Item, exactly

_SHAPES = ("circle", "rectangle", "triangle")


def questions(split: str) -> Iterator[tuple[Image.Image, Item]]:
    """Every question of a split, `test` or `train`, in the package's order. Raises ValueError without the package."""
    try:
        import easy_vqa
    except ImportError as error:
        raise ValueError("the task easy-vqa asks questions of the package easy-vqa; pip install easy-vqa==1.0") from error
    sources = {
        "test": (easy_vqa.get_test_questions, easy_vqa.get_test_image_paths),
        "train": (easy_vqa.get_train_questions, easy_vqa.get_train_image_paths),
    }
    if split not in sources:
        raise ValueError(f"split {split!r} is not one of {', '.join(sources)}")
    asked, paths = (source() for source in sources[split])
    for text, answer, number in zip(*asked, strict=True):
        with Image.open(paths[number]) as picture:
            yield picture.convert("RGB"), Item("easy-vqa", _type(answer), text, answer, exactly(answer))


def write_rows(folder: Path) -> Path:
    """Write the training split as `espalier finetune --data` takes it, a picture and all its questions a line; returns the file."""
    import easy_vqa

    asked, paths = easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()
    turns: dict[int, list[dict[str, str]]] = defaultdict(list)
    for text, answer, number in zip(*asked, strict=True):
        turns[number] += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "easy-vqa-train.jsonl"
    rows.write_text("".join(json.dumps({"image": paths[number], "conversations": said}) + "\n" for number, said in turns.items()))
    return rows


def _type(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes or no"
    return "shape" if answer in _SHAPES else "color"
