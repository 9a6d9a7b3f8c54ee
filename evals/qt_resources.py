"""The resource files of Qt programs (`.rcc`)."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_COMPRESSED, _DIRECTORY = 1, 2
"""Flags of an entry."""


def read_resources(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files in a resource file of format 2 or 3, each with its path inside.

    The format: a header, and a tree of entries that point at names (UTF-16, behind a length and a hash) and at data (behind its
    length).
    """
    raw = path.read_bytes()
    magic, version, tree, data, names = struct.unpack_from(">4s4I", raw)
    if magic != b"qres" or version not in (2, 3):
        raise ValueError(f"{path} is not a Qt resource file of format 2 or 3")

    def walk(entry: int, inside: str) -> Iterator[tuple[str, bytes]]:
        at = tree + 22 * entry
        name, flags, first, second = struct.unpack_from(">IH2I", raw, at)
        length = struct.unpack_from(">H", raw, names + name)[0] if entry else 0
        inside = f"{inside}/{raw[names + name + 6 :][: 2 * length].decode('utf-16-be')}" if entry else inside
        if flags & _DIRECTORY:
            for child in range(second, second + first):
                yield from walk(child, inside)
        else:
            start = data + second + 4
            content = raw[start : start + struct.unpack_from(">I", raw, start - 4)[0]]
            yield inside, zlib.decompress(content[4:]) if flags & _COMPRESSED else content

    yield from walk(0, "")
