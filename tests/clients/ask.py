"""What every client asks, and what fits the answer."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

MODEL = "espalier-embedded"
PICTURE = Path(__file__).parents[2] / "docs/samples/shapes.png"
URL = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
QUESTION = "What color is the large star?"
ANSWER = "white"
MESSAGES: list[Any] = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": QUESTION}]}
]


class Star(BaseModel):
    """A star as it is painted."""

    color: Literal["red", "green", "blue", "white"]
    large: bool
