"""Packages of Debian that hold pictures to ask about, and the resource files of Qt programs."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoints.cache import cache_folder

ROOT = Path("/")
_COMPRESSED, _DIRECTORY = 1, 2
"""Flags of a Qt resource."""


@dataclass(frozen=True)
class Package:
    """`inside` is the folder that is wanted."""

    name: str
    inside: Path

    def folder(self) -> Path:
        """The installed package's, or that of one fetched into the user's cache. Raises ValueError where it cannot be had."""
        if (ROOT / self.inside).is_dir():
            return ROOT / self.inside
        kept = cache_folder() / self.name
        if not kept.is_dir():
            self._fetch(kept)
        return kept

    def _fetch(self, kept: Path) -> None:
        advice = f"install the package by other means, or put its {self.inside} at {kept}"
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise ValueError(f"{self.name} is a package of Debian's, and there is no apt-get or dpkg-deb here; {advice}")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=kept.parent) as temporary:
            self._call(["apt-get", "download", self.name], temporary, advice)
            [archive] = Path(temporary).glob("*.deb")
            self._call(["dpkg-deb", "-x", archive.name, "."], temporary, advice)
            (Path(temporary) / self.inside).rename(kept)

    def _call(self, command: list[str], where: str, advice: str) -> None:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"{command[0]} cannot get {self.name} ({reason}); {advice}")


def read_resources(path: Path) -> Iterator[tuple[str, bytes]]:
    """The files in a Qt resource file (`.rcc`, format 2 or 3), each with its path inside.

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
