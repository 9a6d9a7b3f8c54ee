"""Stored runs of a sweep: a file with one JSON line a run, written as the run ends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def stored(path: Path) -> list[dict[str, Any]]:
    """All runs so far; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def store(path: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Add runs at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
