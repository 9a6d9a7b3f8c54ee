"""Every wording of every question, from `paraphrases.toml`: those trained on, and those held out."""

from __future__ import annotations

import tomllib
from pathlib import Path

PARAPHRASES: dict[str, dict[str, list[str]]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
"""By what is asked: the wordings `seen` in training, and those `held_out` of it."""
