"""Files that are written all at once, or not at all."""

from __future__ import annotations

from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Whoever reads finds what was there before, or all of `content`."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    part.replace(path)
