"""A file of rows about small pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


def write_rows(folder: Path, pictures: Sequence[int]) -> str:
    """A row about each of these pictures, in order, whose question names the picture and how often it was asked about before."""
    lines = []
    for place, number in enumerate(pictures):
        Image.new("RGB", (40, 30), (number, 0, 0)).save(folder / f"{number}.png")
        asked = f"{number}/{list(pictures[:place]).count(number)}"
        lines.append(json.dumps({"image": f"{number}.png", "question": asked, "answer": "red"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return str(folder / "data.jsonl")
