"""Packages of Debian that hold pictures to ask about."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoints.cache import cache_folder

ROOT = Path("/")


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
