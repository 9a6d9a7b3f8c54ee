"""Files of stored results: a line of JSON each, added as it comes. A writer that is stopped loses no more than its last line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.files import write_whole

Line = dict[str, Any]


def stored(path: Path) -> list[Line]:
    """All lines so far but for a last one that was cut short; none where there is no file. Raises ValueError for another that is
    no JSON."""
    lines = []
    for number, line in enumerate(_whole(path), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}); delete it, and what it held is asked again") from error
    return lines


def store(path: Path, lines: Iterable[Line]) -> None:
    """Add lines at the end, instead of one that was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":
                write_whole(path, b"".join(line + b"\n" for line in _whole(path)))
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def rewrite(path: Path, lines: Iterable[Line]) -> None:
    """All of a file's lines anew."""
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _whole(path: Path) -> list[bytes]:
    """A file's lines; the last one, if no line end follows it, only if it is all there."""
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    try:
        json.loads(last)
    except ValueError:
        return lines
    return [*lines, last]
